"""One joint step of SDXL's own architecture on a CPU, through the command that users run: seconds and memory beside what the plan said.

    python benchmarks/full_size.py [--size sdxl|tiny_sdxl] [--pixels 128] [--models FOLDER] [--training] [--json FILE]

Random weights of 2.57 billion parameters, LoRA on generator and score estimator over one bfloat16 base, the real decoder, Segment
Anything ViT-B and PickScore. Memory is the sum of proportional set sizes of the command's processes, which counts mapped weights
files once. It needs 20 GiB and 10 GB of disk; --models keeps the random weights for the next run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from random_models import write_models

JOB = Path(__file__).parents[1] / "jobs" / "joint_train.py"
LOOK_S = 1.5
"""Seconds between two looks at the memory: each walks through all pages of the process, and stops it meanwhile."""
GROUPS = ("learner", "discriminator", "rollout", "reward")
STEP = {
    "steps": 2,
    "batch": 1,
    "engine.accumulation": 1,
    "preference": {"start_step": 0, "updates": 1, "batch": 1, "candidates": 2, "decode_batch": 2, "threshold": 0.0},
    "run.name": "full_size",
    "monitor.enabled": False,  # its pictures are ten more images before the first step
    "placement.threads": 1,
    "evaluation": {"samples": 0, "batch": 1, "teacher_steps": 1, "student_steps": [1], "ema": 0.95},
}
"""Changes to the preset sdxl_lora_24gb: two steps with a preference update, and the shortest end of a run."""


class Watch:
    """The most memory of a process and its children, before and after a line of its output."""

    def __init__(self, process: subprocess.Popen[str], mark: str) -> None:
        self.peaks = [0.0]
        self.lines: list[tuple[float, str]] = []
        self.cpu_s = 0.0
        self._process, self._mark, self._started = process, mark, time.monotonic()

    def run(self, to_the_end: bool) -> int:
        """Until the process has ended; returns its exit code, or 0 when it was ended at the mark."""
        done = threading.Event()
        thread = threading.Thread(target=self._look, args=(done,))
        thread.start()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic() - self._started, line.rstrip()))
            print(f"{self.lines[-1][0]:7.1f} s {self.peaks[-1] / 2**30:6.2f} GiB  {line}", end="", flush=True)
            if self._mark in line:
                self.peaks.append(0.0)
                self.cpu_s = sum(psutil.Process(self._process.pid).cpu_times()[:2])
                if not to_the_end:
                    self._process.kill()
        done.set()
        thread.join()
        code = self._process.wait()
        return code if to_the_end or len(self.peaks) == 1 else 0

    def _look(self, done: threading.Event) -> None:
        while not done.wait(LOOK_S):
            self.peaks[-1] = max(self.peaks[-1], memory_of(self._process.pid))


def memory_of(pid: int) -> float:
    """Bytes of a process and its children: their proportional set sizes."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
            total += 1024 * int(re.findall(r"^Pss:\s+(\d+)", text, re.M)[0])
    except (psutil.NoSuchProcess, OSError, IndexError):
        pass  # it ended just now
    return total


def settings(models: dict[str, Any], pixels: int, folder: Path) -> dict[str, Any]:
    changes = STEP | models | {"model.resolution": [pixels, pixels], "run.dir": str(folder)}
    changes["rewards"] = [{**reward, "dtype": "bfloat16", "batch": 2} for reward in models["rewards"]]
    return changes | {f"placement.{group}": {"gpus": 0, "gpu_memory_gib": None} for group in GROUPS}


def measure(size: str, pixels: int, folder: Path, overrides: list[str], to_the_end: bool) -> dict[str, Any]:
    """Figures of one step. Raises SystemExit when the command fails."""
    models = write_models(size, folder, torch.bfloat16, torch.device("cpu"))
    with TemporaryDirectory(dir=folder) as runs:
        named = [f"{key}={json.dumps(value)}" for key, value in settings(models, pixels, Path(runs)).items()]
        command = [sys.executable, str(JOB), "sdxl_lora_24gb", "--set", *named, *overrides]
        plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
        found = re.search(r"memory ([\d.]+) GiB", plan.stdout)
        if found is None:
            sys.exit(f"full_size.py: no plan: {plan.stderr}{plan.stdout}")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watch = Watch(process, f"step {2 if to_the_end else 1}/2")
        code = watch.run(to_the_end)
        if code:
            sys.exit(f"full_size.py: the job ended with {code}")
    planned, (training, after) = float(found[1]), [peak / 2**30 for peak in watch.peaks]
    return {
        "size": size,
        "pixels": pixels,
        "planned_gib": planned,
        "peak_gib": training,
        "ratio": training / planned,
        "peak_after_training_gib": after,
        "step_done_after_s": next(seconds for seconds, line in watch.lines if "step 1/2" in line),
        "cpu_s": watch.cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["sdxl", "tiny_sdxl"], default="sdxl")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--models", type=Path, help="folder of the random weights; they stay there")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="more changes to the preset")
    parser.add_argument("--training", action="store_true", help="end the job after its first step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        found = measure(
            options.size, options.pixels, options.models or Path(temporary), options.set, not options.training
        )
    print(
        f"{found['size']} at {found['pixels']} pixels: training {found['peak_gib']:.2f} GiB, planned {found['planned_gib']:.2f}, "
        f"ratio {found['ratio']:.3f}; afterwards {found['peak_after_training_gib']:.2f} GiB; "
        f"the step was done after {found['step_done_after_s']:.0f} s, {found['cpu_s']:.0f} of CPU time, with start and loading"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
