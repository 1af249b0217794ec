"""Two jobs never work on one run: the second is refused while the first lives, and only then. Jobs are real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from flashdmd_ray.config import dump_config, load_config
from flashdmd_ray.run import lock
from flashdmd_ray.run.lock import LOCK, Holder, hold, hold_run
from flashdmd_ray.run.storage import RemotePath
from flashdmd_ray.training.cli import main

WORKER = """
import sys, time
from pathlib import Path
from flashdmd_ray.run import lock
from flashdmd_ray.run.storage import parse_location
lock.RENEW_S = 0.2
with lock.hold(parse_location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def job(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("LEASE_S", 2.0), ("RENEW_S", 0.1), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def test_a_second_job_is_refused_while_the_first_lives_and_only_then(tmp_path, job):
    with (
        pytest.raises(ValueError, match=rf"another job \(host \S+, process {job.pid}, since .* UTC\) works on"),
        hold(tmp_path / "run"),
    ):
        pass
    job.send_signal(signal.SIGKILL)
    job.wait()
    with hold(tmp_path / "run"):
        pass
    with hold(tmp_path / "run"):
        pass


def test_the_training_command_leaves_the_run_of_another_job_as_it_is(tmp_path, job, capsys):
    """Also when that job has only just begun: nothing is recorded yet, and the folder would be removed after a refusal of its own."""
    settings = [f"run.dir={tmp_path}", "run.name=run", "runtime=local"]
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(None, settings)))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main(["--set", *settings, "steps=300"]) == 2
    assert f"process {job.pid}" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "error.log"}
    assert after == before


def stale(folder, **changes):
    holder = asdict(Holder()) | changes
    (folder / LOCK).write_bytes(json.dumps(holder).encode())
    return holder


@pytest.fixture
def store(request):
    return RemotePath(f"memory://leases/{request.node.name}")


def test_a_lease_is_refused_to_others_and_given_back(store, quick):
    stale(store, host="elsewhere")  # left behind by a machine that is gone
    started = time.monotonic()
    with hold(store) as held:
        assert time.monotonic() - started > lock.LEASE_S
        time.sleep(1.0)  # renewed all the while
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), hold(store):
            pass
        held.check()
    assert not (store / LOCK).exists()


def test_a_lease_of_a_process_of_this_machine_that_is_gone_costs_no_waiting(store, quick, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 600.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale(store, pid=ended.pid)
    with hold(store):
        pass


def test_a_job_whose_lease_was_taken_over_stops_and_leaves_the_new_one(store, quick):
    with hold(store) as held:
        usurper = stale(store, host="elsewhere", pid=7)
        while held._usurper is None:
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match=r"another job \(host elsewhere, process 7"):
            held.check()
    assert json.loads((store / LOCK).read_text()) == usurper


def test_checkpoints_elsewhere_are_held_too(tmp_path):
    """Two run folders on two machines, say, whose checkpoints go to one place."""
    with hold_run(tmp_path / "a", tmp_path / "shared"):
        with pytest.raises(ValueError, match="shared"), hold_run(tmp_path / "b", tmp_path / "shared"):
            pass
        with hold_run(tmp_path / "c", Path(tmp_path / "c" / "checkpoints")):
            pass
