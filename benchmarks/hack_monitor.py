"""Check that the hack monitor warns in time and not without cause, against the exact prompt checker, which no run optimises.

    python benchmarks/hack_monitor.py hack --seeds 0 1 2 --out /tmp/hack     # towards mean brightness, without distillation
    python benchmarks/hack_monitor.py joint --seeds 0 1 2 --out /tmp/hack    # the shipped demo as it is
    python benchmarks/hack_monitor.py read /tmp/hack/* OTHER_RUN ...         # the table, of other joint runs too

hack: preference updates alone (`preference.distill=false`), the mean of an image's pixels as the only reward that is optimised, PickScore
and the latent reward held out, at a rate at which the world falls apart within the run. Every other step held-out prompts are drawn
in four steps with the weights as they are, always with the same noise, and the share that shows what the prompt says goes to the metrics as
check/accuracy. A run passes when the verdict was "hacking" before that had lost a tenth of its start; a joint run when no verdict was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashdmd_ray.run.metrics_log import read_metrics

CHECKED = 100
"""Held-out prompts of the checker."""
CHECK_EVERY = {"hack": 2, "joint": 20}
"""Steps between two looks of the checker."""
LOSS = 0.1
BRIGHTNESS = "{kind: custom, name: brightness, path: 'brightness:Brightness'}"
HACK = (
    "preference.distill=false",
    "preference.updates=2",
    "preference.lr=1e-5",
    "preference.decay=null",
    "preference.floor=0",
    "evaluation.ema=0",  # the checker looks at the weights as they are
    f"rewards=[{BRIGHTNESS}, {{kind: pickscore, held_out: true}}, {{kind: latent, held_out: true}}]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for arm, steps in (("hack", 60), ("joint", 100)):
        command = commands.add_parser(arm)
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--set", nargs="*", default=[], help="other settings of the run")
    commands.add_parser("read").add_argument("runs", type=Path, nargs="+")
    train_here = commands.add_parser("train")
    train_here.add_argument("overrides", nargs="+")
    options = parser.parse_args()
    if options.command == "train":
        sys.exit(train(options.overrides))
    if options.command == "read":
        print(table(options.runs))
        return
    for seed in options.seeds:
        name = f"{options.command}-{seed}"
        settings = [
            f"seed={seed}",
            f"steps={options.steps}",
            f"run.name={name}",
            f"run.dir={options.out}",
            *options.set,
        ]
        settings += HACK if options.command == "hack" else ()
        # A process for each run: it can be interrupted and given again, and nothing of one run is left for the next.
        subprocess.run(
            [sys.executable, __file__, "train", *settings], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
        print(table([options.out / name]), flush=True)


def train(settings: list[str]) -> int:
    """One run in this process, with the checker looking on; returns the exit code."""
    import torch

    from flashdmd_ray.batch import Metrics, Prompts
    from flashdmd_ray.config import Config, load_config
    from flashdmd_ray.demo.checker import PromptChecker
    from flashdmd_ray.results.evaluation_data import demo_held_out
    from flashdmd_ray.run.folder import RunDirectory
    from flashdmd_ray.runtime.protocol import Runtime
    from flashdmd_ray.training import job
    from flashdmd_ray.training.observer import Observer
    from flashdmd_ray.training.training_run import TrainingRun

    checker, texts = PromptChecker.load(), demo_held_out(CHECKED, 1).texts
    prompts = Prompts(tuple(texts), torch.arange(len(texts)))

    config = load_config("demo_long", ["runtime=local", "tracking.enabled=false", "evaluation.samples=0", *settings])
    every = CHECK_EVERY["joint" if config.preference.distill else "hack"]

    class Accuracy(Observer):
        def __init__(self, runtime: Runtime) -> None:
            self._runtime = runtime

        def after_step(self, done: int, metrics: Metrics) -> None:
            if (done - 1) % every == 0 or done == config.steps:
                images = self._runtime.generator.generate_images(prompts, config.sampling.timesteps, seed=1)
                metrics["check/accuracy"] = checker.correct(images, list(texts)).float().mean().item()

    class CheckedRun(TrainingRun):
        def __init__(self, config: Config, directory: RunDirectory, runtime: Runtime, *others: Any) -> None:
            super().__init__(config, directory, runtime, *others)
            self.observers.insert(0, Accuracy(runtime))

    job.TrainingRun = CheckedRun  # type: ignore[misc]
    return job.run_job(config)


def table(runs: list[Path]) -> str:
    """A line for each run: when the monitor spoke, and what the checker saw."""
    lines = [
        "| run | steps | suspicious from | hacking from | accuracy at first / then / at the end | a tenth lost from | in time |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append("| " + " | ".join(row(run.name, read_metrics(run / "metrics.jsonl"))) + " |")
    return "\n".join(lines)


def row(name: str, records: list[dict[str, Any]]) -> list[str]:
    """The cells of one run."""
    suspicious, hacking = (first(records, "monitor/verdict", lambda v, level=level: v >= level) for level in (1, 2))
    checked = [record for record in records if record.get("check/accuracy") is not None]
    if not checked:
        return [name, str(len(records)), shown(suspicious), shown(hacking), "-", "-", "-"]
    start = checked[0]["check/accuracy"]
    lost = first(checked, "check/accuracy", lambda accuracy: accuracy < (1 - LOSS) * start)
    then = "-"
    if hacking is not None:
        then = f"{[r['check/accuracy'] for r in checked if r['step'] <= hacking][-1]:.3f}"
    in_time = (
        "-" if lost is None and hacking is None else "yes" if hacking and (lost is None or hacking < lost) else "no"
    )
    accuracies = f"{start:.3f} / {then} / {checked[-1]['check/accuracy']:.3f}"
    return [name, str(len(records)), shown(suspicious), shown(hacking), accuracies, shown(lost), in_time]


def first(records: list[dict[str, Any]], name: str, holds: Any) -> int | None:
    """The first step whose record has the metric, and it holds."""
    return next((record["step"] for record in records if record.get(name) is not None and holds(record[name])), None)


def shown(step: int | None) -> str:
    return "never" if step is None else str(step)


if __name__ == "__main__":
    main()
