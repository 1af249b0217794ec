"""Signals become a flag, and a second one does not wait. Each case is a real process."""

import signal
import subprocess
import sys
import time

import pytest

STEPS = """
import sys, time
from flashdmd_ray.run.interruption import Interruption
with Interruption(grace_s={grace}) as interruption:
    for step in range(100):
        try:
            print("step", step, flush=True)
            time.sleep({seconds})
        finally:
            print("cleaned up", flush=True)
        if interruption.requested:
            print("checkpoint", flush=True)
            break
sys.exit(interruption.exit_code)
"""


def start(seconds, grace=None, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS.format(seconds=seconds, grace=grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "step 0\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_is_finished_and_the_exit_code_tells_the_signal(number, code):
    process = start(seconds=0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "cleaned up\ncheckpoint\n"
    assert err.startswith(f"{number.name}: finishing this step")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_second_signal_does_not_wait_for_the_step(number, code):
    process = start(seconds=60)
    process.send_signal(number)
    assert "finishing this step" in process.stderr.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code, "KeyboardInterrupt left alone ends Python by SIGINT itself"
    assert out == "cleaned up\n"


def test_a_step_that_outlasts_the_grace_is_abandoned():
    process = start(seconds=60, grace=0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "cleaned up\n")
    assert "the step is abandoned" in err


NOTICES = [(signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGXCPU, 152)]


@pytest.mark.parametrize(("number", "code"), NOTICES)
def test_notices_of_terminals_and_batch_systems_may_come_several_times(number, code):
    process = start(seconds=0.5)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the time limit itself, which is the first that insists
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "cleaned up\ncheckpoint\n")
    assert err.count("finishing this step") == 1


def test_nohup_is_respected():
    process = start(seconds=0.2, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "cleaned up\n"
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_the_former_handlers_are_restored():
    from flashdmd_ray.run.interruption import Interruption

    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) is before
    assert (interruption.requested, interruption.exit_code) == (False, 0)
