"""Signals become a flag, and a second one does not wait. Each case is a real process."""

import signal
import subprocess
import sys

import pytest

STEPS = """
import sys, time
from flashdmd_ray.run.interruption import Interruption
with Interruption() as interruption:
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


def start(seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS.format(seconds=seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


def test_the_former_handlers_are_restored():
    from flashdmd_ray.run.interruption import Interruption

    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) is before
    assert (interruption.requested, interruption.exit_code) == (False, 0)
