"""What the roles, the engine and the driver cost: our distillation step against a straight-line torch script of the same work.

    python benchmarks/learner_step.py [--pairs 15] [--threads 1] [--json FILE]

One process, the demo's networks, batch 32, the two steps in turn; the ratio of each pair and the median of the ratios are printed, for
Flash-DMD (TTUR 1) and for the DMD2 preset (TTUR 5), and the time of Flash-DMD at TTUR 1 against DMD2 at TTUR 5 per generator update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from straight_line import DMD2, TIMESTEPS, FlashDMD

from flashdmd_ray.batch import Draws
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data import ImageSource, build_images, open_reals
from flashdmd_ray.driver import distil, draw_noise_levels
from flashdmd_ray.roles.discriminator import Discriminator
from flashdmd_ray.roles.latent_adversary import AdversarialScoreEstimator, DenoiserWithHead
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.runtime.build import build_runtime

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
COMMON = ["runtime=local", "preference.updates=0", "evaluation.ema=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = f"placement.threads={options.threads}"
    flash, dmd2 = flash_dmd([*COMMON, threads]), baseline([*COMMON, threads])
    torch.set_num_threads(options.threads)
    found = {"flash_dmd": compare(*flash, options.pairs), "dmd2": compare(*dmd2, options.pairs)}
    found["flash_dmd_against_dmd2"] = compare(flash[0], dmd2[0], options.pairs)
    for name, figures in found.items():
        print(
            f"{name:24s} ratio {figures['ratio']:.3f}  ({figures['ours']:.3f} s against {figures['other']:.3f} s, medians)"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


Step = Callable[[int], object]


def flash_dmd(overrides: list[str]) -> tuple[Step, Step]:
    """(our step, the straight-line step) of the shipped demo."""
    config = load_config(CONFIGS / "demo.yaml", overrides)
    runtime, data = build_runtime(config), build_images(config.data, config.seed)
    family = load_family(config.model)
    heads = Discriminator.from_config(config)
    script = FlashDMD(family, heads.engine.module, config.matching.guidance_scale, config.score.ema)  # type: ignore[arg-type]

    def ours(step: int) -> object:
        return distil(config, runtime, data, Draws(config.seed, step))

    def theirs(step: int) -> object:
        texts, reals, _, high = batch_of(config, data, step, "predict", 0)
        return script.step(texts, reals, high)

    return ours, theirs


def baseline(overrides: list[str]) -> tuple[Step, Step]:
    """The same of the DMD2 preset."""
    config = load_config(CONFIGS / "demo_dmd2.yaml", overrides)
    runtime, data = build_runtime(config), build_images(config.data, config.seed)
    family = load_family(config.model)
    head = AdversarialScoreEstimator.from_config(config).engine.module
    assert isinstance(head, DenoiserWithHead)
    script = DMD2(family, head, config.matching.guidance_scale, config.ttur)

    def ours(step: int) -> object:
        return distil(config, runtime, data, Draws(config.seed, step))

    def theirs(step: int) -> object:
        purposes = ["predict", *(f"critics/{update}" for update in range(1, config.ttur))]
        return script.step([batch_of(config, data, step, purpose, i) for i, purpose in enumerate(purposes)])

    return ours, theirs


def batch_of(
    config: Config, data: ImageSource, step: int, purpose: str, update: int
) -> tuple[tuple[str, ...], torch.Tensor, tuple[str, ...], int]:
    """What the driver would use at this step: prompts, real images with captions, step index, so that both make equal forwards."""
    rows = torch.arange(config.batch)
    family = load_family(config.model)
    reals = open_reals(config, family).reals((step * config.ttur + update) * config.batch + rows, family.image_size)
    high, _ = draw_noise_levels(config, Draws(config.seed, step), purpose)
    assert high < len(TIMESTEPS)
    return data.prompts(purpose, step * config.batch + rows), reals.images, reals.captions, high


def compare(ours: Step, other: Step, pairs: int) -> dict[str, float]:
    """Medians of the two and of the ratio pair by pair; one pair first that does not count."""
    times = []
    for step in range(pairs + 1):
        order = (ours, other) if step % 2 else (other, ours)
        seconds = {}
        for function in order:
            started = time.perf_counter()
            function(step)
            seconds[function] = time.perf_counter() - started
        times.append((seconds[ours], seconds[other]))
    counted = times[1:]
    return {
        "ratio": statistics.median(a / b for a, b in counted),
        "ours": statistics.median(a for a, _ in counted),
        "other": statistics.median(b for _, b in counted),
    }


if __name__ == "__main__":
    main()
