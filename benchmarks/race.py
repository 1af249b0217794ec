"""Race of distillation methods on a demo world: what each costs to reach the final quality of DMD2.

    python benchmarks/race.py tune [--methods dmd2 flash ...]        # the same small search for each method, on a seed of its own
    python benchmarks/race.py run [--methods ...] [--seeds 1 2 3 4 5]  # then the race, with what the search found
    python benchmarks/race.py show                                   # the tables, from what is there; race_page.py draws them

--form sd3 races on the demo's flow teacher with adapters; give it an --out of its own.

All methods have the same networks, data, batch, student steps, averaged weights and held-out evaluation. Each has its own number of
generator updates. Every run leaves a JSON file with the figures of each checkpoint; what is there is not computed again.

| method | what is trained |
|---|---|
| dmd2, dmd2_ttur1 | DMD2 with five, or one, updates of the score estimator for each of the generator |
| flash, flash_ttur2 | Flash-DMD without preference RL: timestep-aware split, pixel GAN on SAM, coupled score estimator |
| no_split, no_gan, latent_gan, no_coupling, per_batch | flash with one part taken out; a latent head rules out the coupling too |

Cost is counted three ways: generator updates; samples drawn for training; and operations, in forwards of the teacher for one image.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joint_training import FIGURES, Training, interval
from safetensors.torch import save_file

from flashdmd_ray.results.page import as_markdown

ROOT = Path(__file__).parents[1]
TUNING_SEED = 100
COMMON = (
    *("runtime=local", "preference.updates=0", "monitor.enabled=false"),
    *("evaluation.student_steps=[4]", "evaluation.ema=0.95"),
)


@dataclass(frozen=True)
class Method:
    """A method of the race.

    updates: of the generator, unless --updates says otherwise. tuned: the method whose search it takes.
    """

    preset: str
    ttur: int
    updates: int
    settings: tuple[str, ...] = ()
    tuned: str = "flash"


METHODS = {
    "dmd2": Method("demo_dmd2", 5, 60, tuned="dmd2"),
    "dmd2_ttur1": Method("demo_dmd2", 1, 60, tuned="dmd2_ttur1"),
    "flash": Method("demo", 1, 60),
    "flash_ttur2": Method("demo", 2, 60, tuned="flash_ttur2"),
    "no_split": Method("demo", 1, 60, ("matching.timestep_split=shared",)),
    "no_gan": Method("demo", 1, 60, ("adversarial.balance=null", "adversarial.weight=0")),
    "latent_gan": Method("demo", 1, 60, ("adversarial.space=latent", "score.ema=1")),
    "no_coupling": Method("demo", 1, 60, ("score.ema=1",)),
    "per_batch": Method("demo", 1, 60, ("matching.timestep_per=batch",)),
}
PICTURES, PICTURES_SEED = 8, 7


@dataclass(frozen=True)
class Form:
    """What a teacher's form asks of every method.

    start: the search's first settings. changes: what it tries on top of the best so far, one after the other; {first} stands for two
    updates of the generator and {end} for all, both counted in updates of the score estimator.
    """

    settings: tuple[str, ...]
    start: tuple[str, ...]
    changes: tuple[str, ...]


FORMS = {
    "sdxl": Form(
        ("matching.guidance_scale=1",),
        ("generator.lr=3e-5", "score.lr=1e-4"),
        (
            "score.lr=3e-4",
            "generator.lr=6e-5 score.lr=3e-4",
            "generator.lr=6e-5 score.lr=8e-4 score.warmup={first} score.decay={end} score.floor=0.1",
        ),
    ),
    "sd3": Form(
        (
            *("model.family=sd3", "lora.networks=[generator,score]", "lora.rank=16", "rewards=[{kind: pickscore}]"),
            *("matching.guidance_scale=1.25", "evaluation.guidance_scale=1.25"),
        ),
        ("generator.lr=6e-4", "score.lr=3e-3"),
        (
            "generator.lr=1.5e-3 score.lr=6e-3",
            "generator.lr=3e-3 score.lr=6e-3",
            "generator.lr=1.5e-3 generator.warmup=40 score.lr=6e-3 score.warmup={first}",
        ),
    ),
}
"""sdxl: all weights are trained. sd3, a flow: adapters, which take higher rates. The last change of each lets the score estimator learn
before the generator does."""


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "show":
        found = read_runs(options.out)
        print(
            "\n\n".join(as_markdown(table) for table in (final_figures(found), costs_to_reach(found)) if len(table) > 1)
        )
        return
    seeds = [TUNING_SEED] if options.what == "tune" else options.seeds
    tasks = [(method, seed) for seed in seeds for method in options.methods]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(partial(in_process, options), tasks))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "run", "show"])
    parser.add_argument("--methods", nargs="+", default=["dmd2", "dmd2_ttur1", "flash", "flash_ttur2"], choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--samples", type=int, default=500, help="held-out prompts per checkpoint")
    parser.add_argument("--form", choices=FORMS, default="sdxl", help="of the teacher (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples of an update")
    parser.add_argument("--updates", type=int, help="of the generator (default: the method's)")
    parser.add_argument("--every", type=int, default=10, help="updates from one checkpoint to the next")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "race")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def in_process(options: argparse.Namespace, task: tuple[str, int]) -> None:
    """One method and seed, in a process of its own."""
    method, seed = task
    command = [sys.executable, __file__, options.what, "--here", "--methods", method, "--seeds", str(seed)]
    command += ["--samples", str(options.samples), "--batch", str(options.batch), "--out", str(options.out)]
    command += ["--form", options.form, "--every", str(options.every)]
    if options.updates:
        command += ["--updates", str(options.updates)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def here(options: argparse.Namespace) -> None:
    (name,), (seed,) = options.methods, options.seeds
    if options.what == "tune":
        tune(options, name)
        return
    tuned = options.out / f"tuned-{METHODS[name].tuned}.json"
    chosen = json.loads(tuned.read_text())["chosen"] if tuned.exists() else FORMS[options.form].start
    record(options, name, seed, chosen, options.out / f"{name}-{seed}.json")


def tune(options: argparse.Namespace, name: str) -> None:
    """Keep each change of the form's search that lowers the mean Frechet distance of the checkpoints, so speed counts."""
    file = options.out / f"tuned-{name}.json"
    if file.exists():
        return
    form, method = FORMS[options.form], METHODS[name]
    scale = {"first": 2 * method.ttur, "end": (options.updates or method.updates) * method.ttur}
    chosen, trials = list(form.start), []
    for trial, change in enumerate(("", *form.changes)):
        changed = by_key(change.format(**scale).split())
        settings = [f"{key}={value}" for key, value in (by_key(chosen) | changed).items()]
        runs = options.out / f"trial-{name}-{trial}.json"
        rows = record(options, name, TUNING_SEED, settings, runs)
        trials.append({"settings": settings, "frechet": statistics.mean(row["frechet"] for row in rows)})
        if trials[-1]["frechet"] <= min(one["frechet"] for one in trials):
            chosen = settings
    file.write_text(json.dumps({"chosen": chosen, "trials": trials}, indent=1) + "\n")


def by_key(settings: Sequence[str]) -> dict[str, str]:
    """Values of settings key=value by their keys."""
    return dict(setting.split("=", 1) for setting in settings)


def record(
    options: argparse.Namespace, name: str, seed: int, settings: Sequence[str], file: Path
) -> list[dict[str, Any]]:
    """Train a method, with figures at each checkpoint. A file that is there is read instead."""
    method = METHODS[name]
    if file.exists():
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        return rows
    updates = options.updates or method.updates
    steps = [f"steps={updates}", f"generator.decay={updates}", "generator.floor=0.1", f"ttur={method.ttur}"]
    steps += [f"batch={options.batch}", f"seed={seed}"]
    settings_of_run = [*COMMON, *FORMS[options.form].settings, *method.settings, *settings, *steps]
    cost, rows = cost_of_step(Training(settings_of_run, method.preset)), []
    training = Training(settings_of_run, method.preset)
    done = 0
    for end in [*range(0, updates, options.every), updates]:
        training.run(done, end)
        done = end
        (figures,) = [row for row in training.figures(seed, options.samples) if row["name"] != "real images"]
        spent = {key: end * value for key, value in cost.items()}
        measured: dict[str, Any] = {key: figures[key] for key in FIGURES} | spent
        rows.append({"method": name, "seed": seed, "updates": end, "settings": list(settings)})
        rows[-1] |= {key: round(value, 4) for key, value in measured.items()}
        print(f"{name}, seed {seed}, {end} updates: Frechet distance {figures['frechet']:.1f}", flush=True)
    draw(training, file.with_suffix(".safetensors"))
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return rows


@torch.no_grad()
def draw(training: Training, file: Path) -> None:
    """Keep the student's images of the first held-out prompts; prompts and noise are the same for all methods and seeds."""
    from flashdmd_ray.roles.image_sampling import sample_all_images, student_sampler

    generator, (timesteps,) = training.runtime.generator, training.config.student_timesteps.values()
    sampler = student_sampler("student", generator.family, generator.engine.module, timesteps)
    texts = training.judges(PICTURES_SEED, 100)[0].texts[:PICTURES]
    with nullcontext() if generator.average is None else generator.average.applied():
        images = sample_all_images(generator.family, sampler, texts, range(PICTURES), PICTURES_SEED, PICTURES)
    save_file({"images": images}, file, {"prompts": json.dumps(list(texts))})


COUNTED_STEPS = 4
"""A step costs what the timesteps it draws ask for, so its operations are a mean."""


def cost_of_step(training: Training) -> dict[str, float]:
    """Samples that a step generates, and its operations in forwards of the teacher's network for one image. Makes the first steps."""
    from torch.utils.flop_counter import FlopCounterMode

    from flashdmd_ray.roles.networks import x0_predictor

    config, family = training.config, training.runtime.generator.family
    teacher = x0_predictor(family.teacher, family.schedule, family.encode(["one prompt"]))
    with FlopCounterMode(display=False) as forward:
        teacher(torch.zeros(1, *family.latent_shape), torch.tensor([500]))
    with FlopCounterMode(display=False) as steps:
        training.run(0, COUNTED_STEPS)
    forwards = steps.get_total_flops() / forward.get_total_flops() / COUNTED_STEPS
    return {"samples": config.batch * config.ttur, "forwards": forwards}


COSTS = ("updates", "samples", "forwards")
Runs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
"""Method -> seed -> figures of each checkpoint, the first before training."""


def read_runs(folder: Path) -> Runs:
    """Results of `run` in a folder; exits with a line when there is none."""
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name in METHODS:
        for file in sorted(folder.glob(f"{name}-[0-9]*.json")):
            rows = json.loads(file.read_text())
            runs.setdefault(name, {})[rows[0]["seed"]] = rows
    if not runs:
        sys.exit(f"{folder} has no finished run; make some first: python benchmarks/race.py run")
    return runs


def final_figures(runs: Runs) -> list[list[str]]:
    """Each method's last checkpoint: means over seeds with 95 % intervals."""
    table = [["method", "seeds", "updates", "FD", "prompt accuracy", "samples", "forwards"]]
    for name, of in runs.items():
        last = [rows[-1] for rows in of.values()]
        cells = [interval([row[key] for row in last]) for key in ("frechet", "accuracy")]
        costs = [f"{last[0]['samples']:,}", f"{last[0]['forwards']:,.0f}"]
        table.append([name, str(len(of)), str(last[0]["updates"]), *cells, *costs])
    return table


def costs_to_reach(runs: Runs) -> list[list[str]]:
    """Cost to reach the last figures of DMD2, as a share of what DMD2 took, seed by seed: median, lowest and highest."""
    table = [["to reach DMD2's last figures", "seeds", *COSTS]]
    for name, of in runs.items():
        seeds = sorted(of.keys() & runs.get("dmd2", {}).keys())
        if name != "dmd2" and seeds:
            shares = [share_of_cost(of[seed], runs["dmd2"][seed]) for seed in seeds]
            table.append([name, str(len(seeds)), *(spread([share[cost] for share in shares]) for cost in COSTS)])
    return table


def share_of_cost(rows: Sequence[Mapping[str, Any]], rival: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Cost until a checkpoint has the rival's last distance and accuracy, divided by the cost of the rival's run; inf if none has."""
    goal = rival[-1]
    there = [row for row in rows if row["frechet"] <= goal["frechet"] and row["accuracy"] >= goal["accuracy"]]
    return {cost: there[0][cost] / goal[cost] if there else float("inf") for cost in COSTS}


def spread(values: Sequence[float]) -> str:
    """Median, and the lowest and highest; a cost that was not reached is `never`."""
    middle, low, high = (
        "never" if value == float("inf") else f"{value:.2f}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    if "--here" in sys.argv:
        here(parse())
    else:
        main()
