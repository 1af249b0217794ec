"""Cost of a training step, and the share that roles, engine and driver add to it.

    python benchmarks/learner_step.py [--seconds 150] [--batch 8] [--threads 1] [--json FILE]

Our distillation step against a straight-line torch script of the same work, in one process, on the demo's networks. A
round makes the same step four times: Flash-DMD (TTUR 1) and the DMD2 preset (TTUR 5), each with our roles and as a script; the next round
makes them in the opposite order. Ratios are taken within a round, the median over the rounds is printed with its quartiles: of seconds,
and of CPU seconds, which say more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rounds import Way, compare, describe, measure_rounds
from straight_line import DMD2, TIMESTEPS, FlashDMD
from torch.utils.flop_counter import FlopCounterMode

from flashdmd_ray.batch import StepRng
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data import ImageSource, build_images, open_reals
from flashdmd_ray.driver import distil, sample_noise_levels
from flashdmd_ray.roles.discriminator import Discriminator
from flashdmd_ray.roles.latent_adversary import AdversarialScoreEstimator, DenoiserWithHead
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.runtime.build import build_runtime

COMMON = ["runtime=local", "preference.updates=0", "evaluation.ema=0", "matching.guidance_scale=2.0"]
"""Distillation alone, and equal teachers for both algorithms: the demo's scale of 1 would save Flash-DMD a forward."""

COMPARED = {
    "flash_dmd": ("flash_dmd", "flash_dmd script"),
    "dmd2": ("dmd2", "dmd2 script"),
    "flash_dmd against dmd2": ("flash_dmd", "dmd2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="as many rounds as fit, three at least")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        found = compare_with_script(options)
    except ValueError as error:
        sys.exit(f"learner_step.py: {error}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def compare_with_script(options: argparse.Namespace) -> dict[str, object]:
    overrides = [*COMMON, f"placement.threads={options.threads}", f"batch={options.batch}"]
    steps = flash_dmd(overrides) | baseline(overrides)
    operations = {name: count_operations(step) for name, step in steps.items()}
    for name in ("flash_dmd", "dmd2"):
        ours, script = operations[name], operations[f"{name} script"]
        print(f"{name:24s} {ours / 1e9:.2f} GFLOP a step, the script {script / 1e9:.2f}")
        if abs(ours / script - 1) > 1e-3:
            raise ValueError(f"{name}: the script does other work than our step, so their times cannot be compared")
    rounds = measure_rounds(steps, options.seconds, time.process_time)
    found: dict[str, object] = {name: compare(rounds, *pair) for name, pair in COMPARED.items()}
    print(f"{len(rounds)} rounds, batch {options.batch}")
    for name, figures in found.items():
        print(f"{name:24s} {describe(figures)}")
    return found


def count_operations(step: Way) -> int:
    """Floating-point operations of one step's matrix products and convolutions, forwards and backwards.

    Prompts are encoded before, since the first step would encode them for both.
    """
    step(0)
    with FlopCounterMode(display=False) as counter:
        step(0)
    return counter.get_total_flops()


def flash_dmd(overrides: list[str]) -> dict[str, Way]:
    """Our step and the straight-line step of the shipped demo."""
    config = load_config("demo", overrides)
    runtime, data = build_runtime(config), build_images(config.data, config.seed)
    family = load_family(config.model)
    heads = Discriminator.from_config(config)
    script = FlashDMD(family, heads.engine.module, config.matching.guidance_scale, config.score.ema)  # type: ignore[arg-type]

    def ours(step: int) -> object:
        return distil(config, runtime, data, StepRng(config.seed, step))

    def theirs(step: int) -> object:
        texts, reals, _, levels = batch_of(config, data, step, "predict", 0)
        return script.step(texts, reals, levels)

    return {"flash_dmd": ours, "flash_dmd script": theirs}


def baseline(overrides: list[str]) -> dict[str, Way]:
    """Our step and the straight-line step of the DMD2 preset."""
    config = load_config("demo_dmd2", overrides)
    runtime, data = build_runtime(config), build_images(config.data, config.seed)
    family = load_family(config.model)
    head = AdversarialScoreEstimator.from_config(config).engine.module
    assert isinstance(head, DenoiserWithHead)
    script = DMD2(family, head, config.matching.guidance_scale, config.ttur)

    def ours(step: int) -> object:
        return distil(config, runtime, data, StepRng(config.seed, step))

    def theirs(step: int) -> object:
        purposes = ["predict", *(f"critics/{update}" for update in range(1, config.ttur))]
        batches = [batch_of(config, data, step, purpose, i) for i, purpose in enumerate(purposes)]
        return script.step([(texts, reals, captions, int(levels[0])) for texts, reals, captions, levels in batches])

    return {"dmd2": ours, "dmd2 script": theirs}


def batch_of(
    config: Config, data: ImageSource, step: int, purpose: str, update: int
) -> tuple[tuple[str, ...], torch.Tensor, tuple[str, ...], torch.Tensor]:
    """The driver's batch at this step (prompts, real images with captions, noise levels), so that both make equal forwards."""
    rows = torch.arange(config.batch)
    family = load_family(config.model)
    reals = open_reals(config, family).reals((step * config.ttur + update) * config.batch + rows, family.image_size)
    levels = sample_noise_levels(config, StepRng(config.seed, step), purpose)
    assert levels.max_step < len(TIMESTEPS)
    return data.prompts(purpose, step * config.batch + rows), reals.images, reals.captions, levels.high_noise


if __name__ == "__main__":
    main()
