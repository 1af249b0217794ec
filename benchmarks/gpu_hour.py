"""Measure on one GPU of 80 GB or more, in ten minutes, what plans predict: steps, memory and rates, beside the plan.

    python benchmarks/gpu_hour.py [--parts tests sdxl sd3 24gb image publish] [--out runs/gpu_hour] [--device cuda|cpu] [--tiny]

sdxl, sd3: joint steps of SDXL and SD3-Medium with LoRA at 1024 pixels, at several micro-batches. 24gb: the preset of that name in the
memory of such a card. image: one image in four steps, drawn and decoded. publish: weights from a learner to rollouts on Ray. tests: those
that need a GPU. Weights are random, of the published sizes, and drawn on the GPU; nothing is downloaded.

Every part runs in a process of its own with a deadline. Its rows are appended to results.jsonl when they are known; results.md has them
as a table. It needs torch, transformers, peft, diffusers and segment-anything, 16 GB of disk, and Ray for publish alone. --device cpu
--tiny: the same code on networks of the demo's size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # a test imports it from elsewhere

from metered_step import Measured, matmul_peak, measure_step  # noqa: E402
from random_models import write_models  # noqa: E402

from flashdmd_ray.config import Config, load_config  # noqa: E402
from flashdmd_ray.engine.processes import local_device  # noqa: E402
from flashdmd_ray.plan import specs  # noqa: E402
from flashdmd_ray.plan.costs import cost_of  # noqa: E402
from flashdmd_ray.plan.fit import GIB, processes  # noqa: E402
from flashdmd_ray.plan.hardware import GPUS, UTILISATION, Gpu  # noqa: E402
from flashdmd_ray.plan.mean_step import step_of  # noqa: E402
from flashdmd_ray.plan.models import models_of  # noqa: E402
from flashdmd_ray.plan.parts import parts_of_models  # noqa: E402
from flashdmd_ray.roles.image_sampling import sample_all_images, student_sampler  # noqa: E402
from flashdmd_ray.roles.networks import load_family  # noqa: E402
from flashdmd_ray.runtime.environment import on_gpu  # noqa: E402

Row = dict[str, Any]
GROUPS = ("learner", "discriminator", "rollout", "reward")
DEADLINES = {"tests": 120, "sdxl": 180, "sd3": 240, "24gb": 120, "image": 90, "publish": 120}
"""Parts, and the seconds that each may take."""
COLUMNS = {
    "part": "part",
    "what": "what",
    "seconds": "s",
    "planned_seconds": "planned s",
    "tflop": "TFLOP",
    "tflop_per_s": "TFLOP/s",
    "share_of_peak": "of matmul peak",
    "peak_gib": "GiB",
    "planned_gib": "planned GiB",
    "note": "note",
}


@dataclass(frozen=True)
class Place:
    """Surroundings of a part. models: the folder of the random weights."""

    device: torch.device
    tiny: bool
    models: Path

    def load(self, preset: str, size: str, changes: Mapping[str, Any]) -> Config:
        """A preset on random weights, every step of it alike: with all its preference updates and without a probe."""
        tiny = "tiny_sd3" if size == "sd3_medium" else "tiny_sdxl"
        name = tiny if self.tiny else size
        dtype = torch.float32 if self.tiny else torch.bfloat16
        named = write_models(name, self.models / name, dtype, self.device)
        alike = {"preference.start_step": 0, "preference.threshold": 0.0, "monitor.enabled": False}
        chosen = {**alike, "run.name": "gpu_hour", **named, **changes}
        if self.tiny:
            preset = "demo_sd3" if size == "sd3_medium" else "demo"
            chosen |= {"runtime": "local", "batch": 4, "preference.updates": 1, "preference.batch": 4}
        if self.device.type == "cpu":
            chosen |= {f"placement.{group}.gpus": 0 for group in GROUPS}
        return load_config(preset, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])

    def gpu(self) -> Gpu:
        """The data sheet that plans are made with."""
        name = torch.cuda.get_device_name().lower() if self.device.type == "cuda" else ""
        return next((gpu for gpu in GPUS.values() if gpu.name in name.replace(" ", "")), GPUS["h100"])


def joint_step(place: Place, config: Config, what: str, steps: int) -> Row:
    """A step beside its plan, with every call of a role."""
    models = models_of(config)
    planned = step_of(config, models, place.gpu())
    process = processes(config, parts_of_models(config, models), planned)["local"]
    assert planned is not None, "stock models are known"
    assert planned.timing is not None, "a GPU was named"
    assert process is not None, "stock models are known"
    tflop = sum(work.flops for work in planned.works) / 1e12
    try:
        found = measure_step(config, place.device, steps)
    except torch.OutOfMemoryError as error:
        return {"what": what, "planned_gib": process.gpu_gib, "note": f"out of memory: {str(error).splitlines()[0]}"}
    held = (process.held + process.activations) / GIB
    return {
        "what": what,
        **rate(place, found.seconds, tflop),
        "planned_seconds": planned.timing.seconds,
        "peak_gib": found.peak / GIB,
        "planned_gib": held if place.device.type == "cuda" else process.cpu_gib,
        "reserved_gib": found.reserved / GIB,
        "planned_in_all_gib": process.gpu_gib,
        "calls": calls(found, {each.call: each.seconds for each in planned.timing.times}, steps),
    }


def rate(place: Place, seconds: float, tflop: float) -> Row:
    """Seconds and operations, and the share of what large matrix products reach here."""
    peak = matmul_peak(place.device) / 1e12
    return {"seconds": seconds, "tflop": tflop, "tflop_per_s": tflop / seconds, "share_of_peak": tflop / seconds / peak}


def calls(found: Measured, planned: Mapping[str, float], steps: int) -> Row:
    """Seconds of each call in a step, beside the plan's, and its peak."""
    return {
        name: {
            "seconds": verb.seconds / steps,
            "planned_seconds": planned.get(name.split(".")[1]),
            "peak_gib": verb.peak / GIB,
        }
        for name, verb in found.verbs.items()
    }


def sdxl(place: Place) -> Iterator[Row]:
    """SDXL LoRA, batch 8."""
    for parts in (4, 2, 1):
        changes = {"engine.accumulation": parts, "preference.batch": 4, "adversarial.accumulation": max(2, parts)}
        config = place.load("sdxl_lora_80gb", "sdxl", changes)
        yield joint_step(place, config, f"micro-batches of {config.batch // parts}", 1 if place.tiny else 2)
        if place.tiny:
            return


def sd3(place: Place) -> Iterator[Row]:
    """SD3-Medium LoRA with TTUR 2, half the preset's batch."""
    for parts in (4, 2):
        config = place.load("sd3_medium_lora_80gb", "sd3_medium", {"batch": 16, "engine.accumulation": parts})
        yield joint_step(place, config, f"micro-batches of {config.batch // parts}", 1)
        if place.tiny:
            return


def small_card(place: Place) -> Iterator[Row]:
    """The 24 GB preset with no more memory than it plans with."""
    config = place.load("sdxl_lora_24gb", "sdxl", {})
    cap = config.placement.learner.gpu_memory_gib
    if place.device.type == "cuda" and cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap * GIB / torch.cuda.get_device_properties(0).total_memory)
    yield joint_step(place, config, f"in {cap} GiB" if cap else "without a cap", 2)


@torch.no_grad()
def image(place: Place) -> Iterator[Row]:
    """One image of a student in the configured steps, the second of two."""
    config = place.load("sdxl_lora_80gb", "sdxl", {})
    family = load_family(config.model, device=place.device)
    sampler = student_sampler("student", family, family.teacher, config.sampling.timesteps)

    def draw() -> float:
        started = time.perf_counter()
        sample_all_images(family, sampler, ["colour gradient 1"], [0], 0, 1)
        return time.perf_counter() - started

    draw()
    models = models_of(config)
    costs = (sampler.nfe, cost_of(specs.teacher(config, models))), (1, cost_of(specs.vae(config, models)))
    flops = sum(times * cost.uses["forward"].flops(1) for times, cost in costs if cost is not None)
    planned = flops / (UTILISATION * place.gpu().matmul)
    what = f"{sampler.nfe} forwards and the decoder"
    yield {"what": what, **rate(place, draw(), flops / 1e12), "planned_seconds": planned}


def publish(place: Place) -> Iterator[Row]:
    yield command([sys.executable, str(HERE / "ray_overhead.py"), "--parts", "publish", "--seconds", "30"])


def gpu_tests(place: Place) -> Iterator[Row]:
    yield command([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])


def command(words: list[str]) -> Row:
    """Last lines of a command's output."""
    started = time.perf_counter()
    done = subprocess.run(words, cwd=HERE.parent, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    note = "; ".join(said[-3:] if done.returncode == 0 else said[-1:]) or "it said nothing: no test is for this machine"
    return {"what": f"exit code {done.returncode}", "seconds": time.perf_counter() - started, "note": note}


PARTS: Mapping[str, Callable[[Place], Iterator[Row]]] = {
    "tests": gpu_tests,
    "sdxl": sdxl,
    "sd3": sd3,
    "24gb": small_card,
    "image": image,
    "publish": publish,
}


def run_part(name: str, place: Place, results: Path) -> None:
    """Append the rows of a part, each when it is known."""
    if place.device.type == "cuda":
        on_gpu()
    for row in PARTS[name](place):
        append(results, {"part": name, **row})


def append(results: Path, row: Row) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value := row.get(key, ""), float) else str(value) for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_all(options: argparse.Namespace, results: Path) -> None:
    """Each part in a process of its own."""
    arguments = [*(["--tiny"] if options.tiny else []), "--device", options.device, "--out", str(options.out)]
    for name in options.parts:
        started, before = time.perf_counter(), len(results.read_text().splitlines())
        words = [sys.executable, __file__, *arguments, "--only", name]
        with subprocess.Popen(words, start_new_session=True) as process:
            try:
                code = process.wait(DEADLINES[name])
                fault = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                fault = f"not done after {DEADLINES[name]} s"
                os.killpg(process.pid, signal.SIGKILL)
        if fault:
            append(results, {"part": name, "note": fault, "seconds": time.perf_counter() - started})
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        (options.out / "results.md").write_text(table(rows))
        print(table(rows[before:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_hour"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of the demo's size")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cpu") if options.device == "cpu" else local_device()
    if device.type != options.device:
        sys.exit("gpu_hour.py: torch sees no GPU; --device cpu --tiny runs the same code on small networks")
    if device.type == "cpu" and not options.tiny:
        sys.exit("gpu_hour.py: --device cpu needs --tiny; benchmarks/full_size.py makes a step of real size on a CPU")
    results = options.out / "results.jsonl"
    if options.only:
        run_part(options.only, Place(device, options.tiny, options.out / "models"), results)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = matmul_peak(device) / 1e12
    results.write_text("")
    append(results, {"part": "matmul", "what": name, "tflop_per_s": peak, "note": f"plans take {UTILISATION:.0%}"})
    run_all(options, results)


if __name__ == "__main__":
    main()
