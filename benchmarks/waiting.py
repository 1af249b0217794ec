"""CPU time that a job's processes take while it waits for a worker: `python benchmarks/waiting.py [--seconds 60]`.

A real job on Ray with the small roles of small_roles.py, whose learner is stopped by SIGSTOP in the middle of a step. Other work on the
machine hardly matters.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
from chaos import start, workplace
from chaos_job import SMALL
from chaos_strikes import marked_processes, workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    seconds = parser.parse_args().seconds
    os.environ[SMALL] = "1"
    with workplace() as folder, tempfile.NamedTemporaryFile(suffix=".log") as log:
        run = start(folder, Path(log.name), 1000, f"deadlines.call_s={10 * seconds:g}", "deadlines.start_s=600")
        try:
            assert run.wait_for_step(10, 600), "the job has ended"
            names = {pid: role for role in ("discriminator", "rollout", "reward") for pid in workers(folder, role)}
            (learner,) = workers(folder, "learner")
            os.kill(learner, signal.SIGSTOP)
            time.sleep(5)
            names |= {run.pid: "driver", learner: "learner (stopped)"}
            others = marked_processes(folder)
            before = {pid: psutil.Process(pid).cpu_times() for pid in others}
            began = time.monotonic()
            time.sleep(seconds)
            passed = time.monotonic() - began
            for pid, old in before.items():
                now = psutil.Process(pid).cpu_times()
                spent = now.user + now.system - old.user - old.system
                print(f"{names.get(pid, others[pid])}: {100 * spent / passed:.2f} % of a core")
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait_for_end(60)
            for pid in marked_processes(folder):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
