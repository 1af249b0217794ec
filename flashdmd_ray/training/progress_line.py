"""The few figures of a step that the terminal shows."""

from __future__ import annotations

from textwrap import fill

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.monitor import ranking
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.training.observer import Observer

SHOWN = {
    "matching/real_fake_gap": "gap",
    "discriminator/accuracy_real": "D real",
    "discriminator/accuracy_fake": "D fake",
    "preference/kept": "kept",
    "preference/beta_h": "|beta H|",
    "generator/lr": "lr",
    "speed/images": "img/s",
    "speed/mfu": "MFU",
    "memory/learner": "GiB",
}
"""Metric -> its name in a progress line; `shown_figures` adds the rewards."""
MEANINGS = {
    "gap": "how far the score estimator is behind",
    "D real": "share of real samples that the discriminator tells right",
    "D fake": "the same for generated ones",
    "kept": "share of prompt groups that are learnt from",
    "|beta H|": "strength of a preference, below .05 it does nothing",
    "lr": "the generator's learning rate",
    "img/s": "images distilled a second",
    "MFU": "share of the GPUs' peak, by planned operations",
    "GiB": "memory of a learner",
}
"""Name in a progress line -> its meaning. A reward's name stands for its mean."""

LEGEND_WIDTH = 90
HELD = "\N{NO-BREAK SPACE}"


class ProgressLine(Observer):
    """Moves the progress display on, and shows how the rewards rank the candidates when that is due."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._shown = shown_figures(config)
        self._progress = progress

    def after_step(self, done: int, metrics: Metrics) -> None:
        self._progress.step(done, {label: metrics[name] for name, label in self._shown.items() if name in metrics})
        for line in ranking.summary(metrics):
            self._progress.say(line)


def legend(config: Config) -> str:
    """The meaning of the figures in a progress line, in lines of a terminal; none breaks inside an entry."""
    labels = shown_figures(config).values()
    entries = [f"{label}: {MEANINGS.get(label, 'mean reward')}".replace(" ", HELD) for label in labels]
    return fill("; ".join(entries), LEGEND_WIDTH, subsequent_indent=8 * " ").replace(HELD, " ")


def shown_figures(config: Config) -> dict[str, str]:
    """Names of the metrics of a progress line, with their labels: the first optimised reward and the first held-out one before the rest."""
    on_gpus = any(placed.gpus for placed in config.placement.groups())
    left_out = {"preference/": not config.preference.updates, "speed/mfu": not on_gpus}
    prefixes = tuple(prefix for prefix, is_left_out in left_out.items() if is_left_out)
    shown = {name: label for name, label in SHOWN.items() if not name.startswith(prefixes)}
    if not config.preference.updates:
        return shown
    first = {reward.held_out: reward.label for reward in reversed(config.rewards)}
    return {
        f"reward/{label}": f"{label} (held out)" if held_out else label for held_out, label in sorted(first.items())
    } | shown
