"""Strike a joint run on Ray with faults drawn from a seed, and compare its weights with those of an undisturbed run.

    python benchmarks/chaos.py OUT [--seeds 0 1 2 3 4] [--faults 10] [--slow 1] [--interval STEPS] [--small] [--report]

Each seed is one run of the demo's networks under real processes: SIGKILL or SIGSTOP of a worker of any role, SIGKILL of Ray's raylet or
its server, SIGKILL or SIGTERM of the driver followed by the same command, a NaN in a gradient, a damaged newest checkpoint before a
rank is lost, a full disk (a small tmpfs: root only). Afterwards the checkpoint must be that of the undisturbed run bit for bit, every
step recorded once, and no process, socket or shared memory left. OUT/faults.jsonl gets a line for each fault, OUT/runs.jsonl one for each
run. Seeds that are in OUT/runs.jsonl are not run again. --report only prints the tables. --small trains roles of one small tensor each
(small_roles.py): the driver's memory over hundreds of steps, its checkpoints and its recoveries in minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from chaos_report import print_report, read  # noqa: E402
from chaos_strikes import KINDS, Strike, marked_processes  # noqa: E402
from chaos_watch import Watched  # noqa: E402

DISK_MIB = 1024
"""Size of the disk with the run folder. A checkpoint of the demo has 131 MiB."""
EVERY = 3
"""Steps between checkpoints."""
PATIENCE_S = 900.0
"""Seconds for a run to make the next step after a fault."""
DEADLINES = {"call_s": 40, "reward_s": 40, "start_s": 300}
SETTINGS = [
    *("runtime=ray", "run.name=struck", "batch=2", "checkpoint.keep=2"),
    *("preference.updates=1", "preference.batch=2", "preference.candidates=2", "monitor.enabled=false"),
    *("evaluation.samples=0", "tracking.enabled=false", "tracking.samples_every=1000"),
    "deadlines.attempts=20",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--faults", type=int, default=10, help="in each run")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--set", metavar="key=value", nargs="+", default=[], help="further settings of the run")
    parser.add_argument(
        "--slow", type=float, default=1.0, metavar="FACTOR", help="for all deadlines, on a busy machine"
    )
    parser.add_argument(
        "--interval", type=int, metavar="STEPS", help="between faults; default: 2 for the first seed, 3, ..."
    )
    parser.add_argument("--small", action="store_true", help="train small_roles.py")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.set += [f"deadlines.{name}={options.slow * seconds:g}" for name, seconds in DEADLINES.items()]
    if not options.report:
        if options.small:
            os.environ["FLASHDMD_CHAOS_SMALL"] = "1"
        intervals = {seed: options.interval or 2 + number for number, seed in enumerate(options.seeds)}
        reference = undisturbed(options.out, options.faults * max(intervals.values()) + EVERY, options.set)
        done = {run["seed"] for run in read(options.out / "runs.jsonl")}
        for seed, interval in intervals.items():
            if seed not in done:
                struck_run(options, seed, interval, reference)
    print_report(options.out)


@contextmanager
def workplace(size_mib: int = 0) -> Iterator[Path]:
    """A short folder for the run and for Ray; size_mib: of the disk that the run folder is on, where root may mount one."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    runs, mounted = folder / "runs", False
    runs.mkdir()
    if size_mib and os.geteuid() == 0:
        options = ["-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(runs)]
        mounted = subprocess.run(["mount", *options], check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(runs)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, log: Path, steps: int, *settings: str) -> Watched:
    environment = os.environ | {"FLASHDMD_CHAOS": str(folder), "RAY_TMPDIR": str(folder), "RAY_ADDRESS": ""}
    environment["RAY_memory_monitor_refresh_ms"] = "0"  # what other programs need is no fault of the run
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    changes = [*SETTINGS, f"checkpoint.every={EVERY}", f"run.dir={folder / 'runs'}", f"steps={steps}", *settings]
    command = [sys.executable, str(HERE / "chaos_job.py"), "--set", *changes]
    return Watched(command, environment, log, folder / "runs" / "struck")


def undisturbed(out: Path, steps: int, settings: list[str]) -> Path:
    """The checkpoints of every EVERY-th step of a run that nothing happens to."""
    kept, log = out / "reference", out / "reference.log"
    if kept.is_dir():
        return kept
    with workplace() as folder:
        run = start(folder, log, steps, *settings, "checkpoint.keep=1000")
        assert run.wait_for_end(3600) == 0, f"the undisturbed run failed: {log}"
        seconds = [b - a for a, b in zip(run.step_times, run.step_times[1:], strict=False)]
        (run.folder / "checkpoints" / "seconds.json").write_text(json.dumps(seconds))
        shutil.copytree(run.folder / "checkpoints", kept)
    return kept


class StruckRun:
    """One run, its faults, and the same command again whenever it has ended before its last step."""

    def __init__(self, options: argparse.Namespace, seed: int, interval: int, folder: Path) -> None:
        faults = options.faults
        self.seed, self.interval = seed, interval
        self.chance = random.Random(seed)
        self.steps = faults * interval + EVERY - faults * interval % EVERY
        self.patience_s = PATIENCE_S * options.slow
        self.command = (folder, options.out / f"seed-{seed}.log", self.steps, *options.set)
        self.run = start(*self.command)
        self.exits: list[int] = []

    def again(self) -> None:
        """Note how it ended and give the same command."""
        self.exits.append(self.run.wait_for_end(60))
        if len(self.exits) > 3:
            raise SystemExit(f"the run ends again and again: {self.exits}, {self.run.log}")
        self.run = start(*self.command)

    def strike(self, number: int, kind: str) -> dict[str, Any]:
        """Do a fault at a random moment of its interval and wait for the next step; returns what happened."""
        step = number * self.interval + self.chance.randrange(1, self.interval + 1)
        while not self.run.wait_for_step(max(1, min(self.steps - 1, step)), self.patience_s):
            self.again()
        self.exits = []
        strike = Strike(kind, self.run, self.chance)
        found = strike.strike() | {"seed": self.seed, "interval": self.interval}
        end = time.monotonic() + self.patience_s
        while not (self.run.stepped_since(strike.at) or self.run.code == 0):
            strike.relieve()
            if self.run.has_ended:
                found.setdefault("detect", time.monotonic() - strike.at)
                strike.relieve(force=True)
                self.again()
            if time.monotonic() > end:
                raise SystemExit(f"{kind}: no step within {self.patience_s:g} s: {self.run.log}")
            time.sleep(0.05)
        strike.relieve(force=True)
        return found | self.run.recovery_since(strike.at) | {"exits": self.exits}

    def finish(self) -> int:
        """Wait for its end; returns the exit code."""
        self.exits = []
        while code := self.run.wait_for_end(3600):
            self.again()
        return code


def struck_run(options: argparse.Namespace, seed: int, interval: int, reference: Path) -> None:
    """Run, strike, compare; append the lines of the seed to the two files."""
    shm = set(os.listdir("/dev/shm"))
    with workplace(size_mib=DISK_MIB) as folder:
        began = time.monotonic()
        struck, kinds = StruckRun(options, seed, interval, folder), options.kinds
        rounds = 1 + options.faults // len(kinds)
        deck = [kind for _ in range(rounds) for kind in struck.chance.sample(kinds, len(kinds))][: options.faults]
        found = [struck.strike(number, kind) for number, kind in enumerate(deck)]
        facts = {"seed": seed, "interval": interval, "steps": struck.steps, "exit": struck.finish()}
        facts |= {"wall": time.monotonic() - began, "left": leftovers(folder, shm)}
        facts |= compare(struck.run.folder, reference, struck.steps)
        facts |= {"step_s": sorted(json.loads((reference / "seconds.json").read_text()))}
        for name, lines in (("faults", found), ("runs", [facts])):
            with (options.out / f"{name}.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def compare(folder: Path, reference: Path, steps: int) -> dict[str, Any]:
    """Differences between the last checkpoint and the undisturbed run's of the same step, and of the record of steps."""
    import torch

    from flashdmd_ray.checkpoint import load_tensors, manifests
    from flashdmd_ray.run.metrics_log import read_metrics

    ours, theirs = ({m.step: m.folder for m in manifests(root)}[steps] for root in (folder / "checkpoints", reference))
    parts = sorted(path.name for path in theirs.glob("*.safetensors"))
    same = parts == sorted(path.name for path in ours.glob("*.safetensors"))
    for part in parts:
        one, other = load_tensors(ours / part), load_tensors(theirs / part)
        same = same and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    recorded = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
    return {"bit_equal": same, "recorded_once": recorded == list(range(1, steps + 1))}


def leftovers(folder: Path, shm: set[str]) -> list[str]:
    """Processes and sockets of the run that are still there, and files in shared memory that no process maps."""
    end = time.monotonic() + 120  # after a SIGKILL of the driver, two agents of Ray end a minute later
    while (alive := marked_processes(folder)) and time.monotonic() < end:
        time.sleep(0.5)
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if str(folder) in line]
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:
            continue
    memory = [name for name in set(os.listdir("/dev/shm")) - shm if f"/dev/shm/{name}" not in mapped]
    time.sleep(10)  # other programs have files there, too, that come and go
    memory = [name for name in memory if Path("/dev/shm", name).exists()]
    return [f"process {pid} {name}" for pid, name in alive.items()] + sockets + memory


if __name__ == "__main__":
    main()
