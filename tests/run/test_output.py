"""Readers that go away do not decide about a job: it goes on, and ends as without them. Each case is a real process."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

JOB = """
import sys, time
from pathlib import Path
from flashdmd_ray.run.command_line import prepare_process
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.progress import Progress
prepare_process()
ready, result, stopped = (Path(path) for path in sys.argv[1:])
first = open(ready.parent / "first", "w")
assert first.fileno() > 2
with Progress(1000) as progress, Interruption(progress.notice) as interruption:
    for step in range(1000):
        progress.say(f"step {step} " + "x" * 1000)
        print("noise", file=sys.stderr, flush=True)
        progress.step(step + 1, {"loss": 0.5})
        ready.touch()
        if interruption.requested or (stopped.exists() and step > 20):
            break
        time.sleep(0.02)
    result.write_text("whole")
sys.exit(interruption.exit_code or 5)
"""


PREPARE = "from flashdmd_ray.run.command_line import prepare_process; prepare_process()"


class Job:
    def __init__(self, folder: Path, **options) -> None:
        self.ready, self.result, self.stop = (folder / name for name in ("ready", "result", "stop"))
        command = [sys.executable, "-c", JOB, *(str(path) for path in (self.ready, self.result, self.stop))]
        self.process = subprocess.Popen(command, **options)

    def wait_until_ready(self) -> None:
        while not self.ready.exists():
            assert self.process.poll() is None, "it ended early"

    def end(self) -> tuple[int, str]:
        return self.process.wait(timeout=60), self.result.read_text()


def test_a_pipe_that_breaks_is_not_noticed(tmp_path):
    reader, writer = os.pipe()
    job = Job(tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    job.wait_until_ready()
    os.close(reader)
    job.stop.touch()
    assert job.end() == (5, "whole")


def test_a_signal_after_the_pipe_broke_ends_it_in_order(tmp_path):
    reader, writer = os.pipe()
    job = Job(tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    job.wait_until_ready()
    os.close(reader)
    job.process.send_signal(signal.SIGINT)
    assert job.end() == (130, "whole")


def test_a_terminal_that_is_closed_ends_it_in_order(tmp_path):
    """The kernel sends SIGHUP to the terminal's processes, and every write fails from then on."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    job = Job(tmp_path, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal)
    os.close(slave)
    while not job.ready.exists():
        os.read(master, 65536)
    os.close(master)
    assert job.end() == (129, "whole")


@pytest.mark.parametrize("place", ["/dev/full", None])
def test_output_that_goes_nowhere_costs_nothing(tmp_path, place):
    """A full disk, or descriptors that were closed before it started: then no other file may take their number."""
    if place is None:
        job = Job(tmp_path, preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])
    else:
        with open(place, "w") as full:
            job = Job(tmp_path, stdout=full, stderr=full)
    job.stop.touch()
    assert job.end() == (5, "whole")


def test_help_may_be_cut_short():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "flashdmd_ray", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=True)
    os.close(writer)
    assert done.stderr == b""


def test_letters_that_the_terminal_has_not_cost_nothing(tmp_path):
    """The environment of many batch systems: ASCII."""
    code = PREPARE + "; print('Größe 質'); print('\\udcf6 end')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == rb"Gr\xf6\xdfe \u8cea" + b"\n" + rb"\udcf6 end" + b"\n"


def test_what_libraries_print_is_no_message_of_a_program():
    code = (
        "import os; from flashdmd_ray.run.output import outlive_readers, private_output\n"
        "ours = private_output(); outlive_readers()\n"
        "print('a library'); os.system('echo a child'); print('ours', file=ours, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n"
    assert sorted(done.stderr.splitlines()) == ["a child", "a library"]


def test_ctrl_c_at_any_time_has_no_traceback():
    handled = "import os, signal; signal.signal(2, signal.default_int_handler)"  # a shell's background jobs ignore it
    code = f"{handled}; {PREPARE}; os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    code = f"import os; os.rmdir(os.getcwd()); {PREPARE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the working directory is gone; change to one that is there\n")


def test_what_was_printed_arrives(tmp_path):
    job = Job(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    job.stop.touch()
    out, _ = job.process.communicate(timeout=60)
    lines = out.decode().splitlines()
    assert sum(" step " in f" {line}" and line.endswith("x") for line in lines) == 22
    assert job.end() == (5, "whole")
