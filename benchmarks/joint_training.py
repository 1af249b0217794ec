"""Compare joint training with distillation alone on a demo world: several seeds of several arms, on held-out prompts and noise.

    python benchmarks/joint_training.py [--preset demo_sd3] [--seeds 0 1 2 3 4] [--arms pixel control ...] [--distil 60]
                                        [--samples 2000] [--workers 2] [--set key=value ...]

| arm | what is trained |
|---|---|
| joint | the preset |
| pixel | joint training towards the pixel reward alone |
| latent | joint training towards the pixel reward's tower on latents (kind latent_clip) alone; the pixel reward is held out |
| control | distillation alone, equal steps |
| rl_only | preference updates alone, which must show reward hacking, or the judge is blind |
| ratio-1, ratio-10 | as pixel, with 1 or 10 preference updates beside a step |
| beta-1.5, beta-150 | as pixel, with a tenth and ten times the default beta |
| teacher | nothing: the teacher with 25 steps, and as a few-step generator |

--distil: the first steps of a seed, which distil only. They are made once and every arm goes on from them, as the paper's two stages do.

Every arm of a seed leaves a JSON file: what is there is not computed again. Prints means with 95 % intervals, and the
differences from the control, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIXEL = "rewards=[{kind: pickscore, pool: reward}]"
LATENT = "rewards=[{kind: latent_clip, pool: reward}, {kind: pickscore, pool: reward, held_out: true}]"
ARMS = {
    "joint": [],
    "pixel": [PIXEL],
    "latent": [LATENT],
    "control": ["preference.updates=0"],
    "rl_only": [PIXEL, "preference.distill=false"],
    "ratio-1": [PIXEL, "preference.updates=1"],
    "ratio-10": [PIXEL, "preference.updates=10"],
    "beta-1.5": [PIXEL, "preference.beta=1.5"],
    "beta-150": [PIXEL, "preference.beta=150"],
}
FIGURES = ("frechet", "accuracy", "reward", "diversity")
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Number of seeds -> the factor of a 95 % interval of their mean."""


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(partial(run_seed, options), options.seeds))
    rows = [
        row
        for arm in options.arms
        for seed in options.seeds
        for row in json.loads(result_file(options, arm, seed).read_text())
    ]
    (options.out / "joint_training.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo_long", help="name of a preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=["joint", "control", "teacher"], choices=[*ARMS, "teacher"])
    parser.add_argument("--distil", type=int, default=0, help="first steps that all arms of a seed share")
    parser.add_argument("--samples", type=int, default=2000, help="held-out prompts per figure")
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to the preset, for all arms")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "joint_training")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """All arms of one seed that have no result yet, in a process of its own."""
    if all(result_file(options, arm, seed).exists() for arm in options.arms):
        return
    command = [sys.executable, __file__, "--here", *sys.argv[1:], "--seeds", str(seed)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def result_file(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return options.out / f"{arm}-{seed}-{options.samples}.json"


def run_here(options: argparse.Namespace) -> None:
    """The arms of one seed, one after the other, from the first stage that they share."""
    (seed,) = options.seeds
    first = options.out / f"distil-{seed}"
    if options.distil and not (first / "done").exists():
        training = Training(settings_of("distil", seed, options), options.preset)
        training.run(0, options.distil)
        training.save(first)
    for arm in options.arms:
        file = result_file(options, arm, seed)
        if file.exists():
            continue
        training = Training(settings_of(arm, seed, options), options.preset)
        if arm != "teacher":
            training.load(first if options.distil else None)
            training.run(options.distil, training.config.steps)
        rows = training.measure(arm, seed, options.samples)
        file.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{arm} {seed}: {json.dumps(rows)}", flush=True)


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    start = [f"preference.start_step={options.distil}"] if options.distil else []
    return ["runtime=local", f"seed={seed}", *options.set, *start, *ARMS.get(arm, ["preference.updates=0"])]


class Training:
    """One run of the driver's loop with the roles in this process, without a run folder: its own `driver.Run`."""

    def __init__(self, settings: Sequence[str], preset: str) -> None:
        from flashdmd_ray.config import load_config
        from flashdmd_ray.monitor import HackMonitor
        from flashdmd_ray.runtime.build import build_runtime

        self.config = config = load_config(preset, settings)
        held_out = [reward.label for reward in config.rewards if reward.held_out]
        self.monitor = HackMonitor(config.monitor, config.optimised_rewards, held_out)
        self.runtime = build_runtime(config)
        self.preference_rate = 1.0
        self.records: list[Mapping[str, float]] = []
        self._range = range(0)

    def run(self, start: int, end: int) -> None:
        from flashdmd_ray.data import build_images
        from flashdmd_ray.driver import train

        self._range = range(start, end)
        train(self.config, self.runtime, build_images(self.config.data, self.config.seed), self)

    def steps(self) -> Iterable[int]:
        return self._range

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        self.records.append(metrics)
        if self.config.monitor_enabled:
            for event in self.monitor.observe(step + 1, metrics)[1]:
                print(f"step {event.step}: {event.message}", flush=True)

    def _roles(self) -> list[Any]:
        return [self.runtime.generator, self.runtime.score, self.runtime.discriminator]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for role in self._roles():
            role.save(folder)
        (folder / "done").touch()

    def load(self, folder: Path | None) -> None:
        for role in self._roles() if folder is not None else ():
            role.load(folder)

    def measure(self, arm: str, seed: int, samples: int) -> list[dict[str, object]]:
        """Figures of the student's few-step rows, or of the teacher's; for a student also what its training said."""
        from flashdmd_ray.roles.image_sampling import student_sampler, teacher_sampler

        config, family = self.config, self.runtime.generator.family
        if arm != "teacher":
            said = {"monitor": self.monitor.verdict.level, "training": self._last_metrics()}
            return [{"arm": arm, "seed": seed} | said | row for row in self.figures(seed, samples)]
        chosen = [
            student_sampler("before", family, family.teacher, timesteps)
            for timesteps in config.student_timesteps.values()
        ]
        chosen.append(teacher_sampler(family, 25, config.teacher_guidance))
        return [{"arm": arm, "seed": seed} | row for row in self._rows(chosen, seed, samples)]

    def figures(self, seed: int, samples: int) -> list[dict[str, object]]:
        """Figures of the student as it is, with its averaged weights where there are such."""
        from flashdmd_ray.roles.image_sampling import student_sampler

        generator = self.runtime.generator
        chosen = [
            student_sampler("student", generator.family, generator.engine.module, timesteps)
            for timesteps in self.config.student_timesteps.values()
        ]
        with nullcontext() if generator.average is None else generator.average.applied():
            return self._rows(chosen, seed, samples)

    def _rows(self, chosen: Sequence[Any], seed: int, samples: int) -> list[dict[str, object]]:
        from flashdmd_ray.results.evaluation import as_record, evaluate

        reference, eval_metrics = self.judges(seed, samples)
        measured = evaluate(self.runtime.generator.family, chosen, reference, eval_metrics, seed, 100)
        return [{"reward": row.rewards["pickscore"]} | as_record(row) for row in measured.rows]

    @cache  # noqa: B019 (both live as long as the process)
    def judges(self, seed: int, samples: int) -> tuple[Any, Any]:
        """Held-out prompts with their images, and the metrics."""
        from flashdmd_ray.results.comparison import build_eval_metrics
        from flashdmd_ray.results.evaluation_data import build_reference

        evaluation = self.config.evaluation.model_copy(update={"samples": samples})
        config, family = self.config.model_copy(update={"evaluation": evaluation}), self.runtime.generator.family
        eval_metrics = build_eval_metrics(config, family)
        assert eval_metrics is not None
        return build_reference(config, family.image_size, seed), eval_metrics

    def _last_metrics(self) -> dict[str, float]:
        """Means over the last ten steps of what says whether preference training acts."""
        kept = [name for name in self.records[-1] if name.startswith(("preference/", "reward/"))]
        last = self.records[-10:]
        return {name: statistics.fmean(record[name] for record in last if name in record) for name in kept}


def table(rows: list[dict[str, object]]) -> str:
    """Means over seeds with 95 % intervals for every sampler of every arm, then differences from the control of the same seeds."""
    groups: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((str(row["arm"]), str(row["name"])), {})[int(row["seed"])] = row  # type: ignore[call-overload, assignment]
    head = "| arm | sampler | seeds | Frechet distance | prompt accuracy | reward | diversity |\n|---|---|---|---|---|---|---|"
    lines = [head]
    for (arm, name), found in groups.items():
        cells = [interval([row[figure] for row in found.values()]) for figure in FIGURES]
        lines.append(f"| {arm} | {name} | {len(found)} | {' | '.join(cells)} |")
    lines += ["", "Differences from the control", "", head]
    for (arm, name), found in groups.items():
        control = groups.get(("control", name), {})
        seeds = sorted(found.keys() & control.keys())
        if arm != "control" and seeds:
            cells = [interval([found[seed][figure] - control[seed][figure] for seed in seeds]) for figure in FIGURES]
            lines.append(f"| {arm} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """The mean of several seeds and half the width of its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT_T.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} +- {half:.3f}"


if __name__ == "__main__":
    if "--here" in sys.argv:
        run_here(parse())
    else:
        main()
