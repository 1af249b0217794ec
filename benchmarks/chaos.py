"""Strike a joint run on Ray with faults drawn from a seed, and compare its weights with those of an undisturbed run.

    python benchmarks/chaos.py OUT [--seeds 0 1 2 3 4] [--faults 10] [--report]

Each seed is one run of the demo's networks under real processes: SIGKILL or SIGSTOP of a worker of any role, SIGKILL of Ray's raylet or
its server, SIGKILL or SIGTERM of the driver followed by the same command, a NaN in a gradient, a damaged newest checkpoint before a
rank is lost, a full disk (a small tmpfs: root only). Afterwards the checkpoint must be that of the undisturbed run bit for bit, every
step recorded once, and no process, socket or shared memory left. OUT/faults.jsonl gets a line for each fault, OUT/runs.jsonl one for each
run. --report only prints their tables.
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

from chaos_report import print_report  # noqa: E402
from chaos_strikes import KINDS, Strike, marked_processes  # noqa: E402
from chaos_watch import Watched  # noqa: E402

EVERY = 3
"""Steps between checkpoints."""
PATIENCE_S = 900.0
"""For a run to make the next step after a fault."""
SETTINGS = (
    *(
        "runtime=ray",
        "batch=2",
        "preference.updates=1",
        "preference.batch=2",
        "preference.candidates=2",
        "run.name=struck",
    ),
    *("evaluation.samples=0", "tracking.enabled=false", "tracking.samples_every=1000", "monitor.enabled=false"),
    *("deadlines.call_s=40", "deadlines.reward_s=40", "deadlines.attempts=20", "checkpoint.keep=3"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--faults", type=int, default=10, help="in each run")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        intervals = {seed: 2 + number for number, seed in enumerate(options.seeds)}
        reference = undisturbed(options.out, options.faults * max(intervals.values()) + EVERY)
        for seed, interval in intervals.items():
            struck_run(options.out, seed, interval, options.faults, options.kinds, reference)
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
    environment["RAY_memory_monitor_refresh_ms"] = (
        "0"  # what other programs of this machine need is no fault of the run
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "chaos_job.py"), "--set", *SETTINGS, f"run.dir={folder / 'runs'}"]
    return Watched([*command, f"steps={steps}", *settings], environment, log, folder / "runs" / "struck")


def undisturbed(out: Path, steps: int) -> Path:
    """The checkpoints of every EVERY-th step of a run that nothing happens to."""
    kept, log = out / "reference", out / "reference.log"
    if kept.is_dir():
        return kept
    with workplace() as folder:
        run = start(folder, log, steps, f"checkpoint.every={EVERY}", "checkpoint.keep=1000")
        assert run.wait_for_end(3600) == 0, f"the undisturbed run failed: {log}"
        seconds = [b - a for a, b in zip(run.step_times, run.step_times[1:], strict=False)]
        (run.folder / "checkpoints" / "seconds.json").write_text(json.dumps(seconds))
        shutil.copytree(run.folder / "checkpoints", kept)
    return kept


def struck_run(out: Path, seed: int, interval: int, faults: int, kinds: list[str], reference: Path) -> None:
    chance = random.Random(seed)
    steps = faults * interval + EVERY - faults * interval % EVERY
    deck = [kind for _ in range(1 + faults // len(kinds)) for kind in chance.sample(kinds, len(kinds))][:faults]
    shm = set(os.listdir("/dev/shm"))
    with workplace(size_mib=160) as folder:
        settings = (folder, out / f"seed-{seed}.log", steps, f"checkpoint.every={EVERY}")
        run, began = start(*settings), time.monotonic()
        for number, kind in enumerate(deck):
            if not run.wait_for_step(
                min(steps - 1, max(1, number * interval + chance.randrange(1, interval + 1))), 600
            ):
                break  # it ended by itself
            strike = Strike(kind, run, chance)
            found = strike.strike() | {"seed": seed, "interval": interval}
            run = recover(run, strike, found, settings)
            with (out / "faults.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
        code = run.wait_for_end(3600)
        wall = time.monotonic() - began
        left = leftovers(folder, shm)
        facts = {"seed": seed, "interval": interval, "steps": steps, "exit": code, "wall": wall, "left": left}
        facts |= compare(run.folder, reference, steps) | {
            "step_s": sorted(json.loads((reference / "seconds.json").read_text()))
        }
        with (out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")


def recover(run: Watched, strike: Strike, found: dict[str, Any], settings: tuple[Any, ...]) -> Watched:
    """Wait for the next step, giving the same command again when the run has ended; notes the seconds in `found`."""
    end = time.monotonic() + PATIENCE_S
    while not run.stepped_since(strike.at):
        strike.relieve()
        if run.has_ended:
            found["exits"] = [*found.get("exits", []), run.code]
            found.setdefault("detect", time.monotonic() - strike.at)
            if len(found["exits"]) > 3:
                raise SystemExit(f"{strike.kind}: the run ends again and again: {found['exits']}, {run.log}")
            strike.relieve(force=True)
            run.close()
            run = start(*settings)
        if time.monotonic() > end:
            raise SystemExit(f"{strike.kind}: no step within {PATIENCE_S:g} s: {run.log}")
        time.sleep(0.05)
    strike.relieve(force=True)
    found |= run.recovery_since(strike.at)
    return run


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
    return [f"process {pid} {name}" for pid, name in alive.items()] + sockets + memory


if __name__ == "__main__":
    main()
