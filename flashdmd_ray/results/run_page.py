"""The page of one finished run or several: what was trained, what it cost, how good it is and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdmd_ray.config import dump_changes
from flashdmd_ray.results.page import Curve, Section, plot, smoothed, write_page
from flashdmd_ray.run.folder import RunDirectory, read_run_config
from flashdmd_ray.run.metrics_log import read_metrics

PAGE, REPORT = "report.html", "report.json"
SMOOTHING = 20
"""Curves are means of up to this many steps, and of a tenth of the run at most."""
CURVES = {
    "matching/real_fake_gap": "gap between teacher and score estimator",
    "score/loss": "denoising loss of the score estimator",
    "adversarial/generator_loss": "generator's loss against the discriminator",
    "discriminator/accuracy_real": "discriminator: real images told right",
    "discriminator/accuracy_fake": "discriminator: generated images told right",
    "preference/loss": "preference loss",
    "preference/beta_h": "|beta H|: below .05 the reference has no effect",
    "monitor/verdict": "hack monitor: 0 healthy, 1 suspicious, 2 hacking",
    "time/step": "seconds a step",
}
"""Metrics that are drawn -> title. The rewards come before them."""
SURE = (
    "± is half the width of a 95 % interval over the prompts of this table. Another seed of training differs by more than that; "
    "only several runs tell by how much."
)


@dataclass(frozen=True)
class FinishedRun:
    """A run folder and the facts of its report.json."""

    path: Path
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Raises ValueError when the run has not come to its end."""
        read_run_config(path)  # says what is wrong with a folder of another kind
        if not (path / REPORT).is_file():
            raise ValueError(
                f"{path} has no {REPORT}: the run is not finished; start its command again, or name another run"
            )
        return cls(path, json.loads((path / REPORT).read_text(encoding="utf-8")))

    @property
    def name(self) -> str:
        return self.path.resolve().name


def write_run_page(runs: Sequence[FinishedRun], path: Path) -> Path:
    """Write the page of the runs, side by side where there are several; returns its path."""
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    labelled = dict(zip(labels, runs, strict=True))
    lead = [_lead(label, run) for label, run in labelled.items()]
    sections = [_table(labelled), _pictures(labelled), _curves(labelled), *map(_making, labelled.items())]
    title = f"{' and '.join(labels)}: few-step student{'s' if len(runs) > 1 else ''} and teacher"
    return write_page(path, title, lead, [section for section in sections if section is not None])


def _lead(label: str, run: FinishedRun) -> str:
    """Sentences on what was trained, its cost, and the student beside its teacher."""
    training, rows = run.facts["training"], run.facts["rows"]
    counters = training["counters"]
    cost = f"{counters['generator_updates']:,} generator updates on {counters['samples']:,} samples"
    if counters["preference_updates"]:
        cost += f" and {counters['preference_updates']:,} preference updates"
    said = f"{label}: {cost}, {_duration(training['seconds'])}."
    student, teacher = _last_student(rows), next((row for row in rows if row["name"].startswith("teacher")), None)
    if student is not None and teacher is not None:
        compared = [
            f"{name} {_cell(student, key)} against the teacher's {_cell(teacher, key)}"
            for key, name in _columns([run]).items()
            if None not in (_value(student, key), _value(teacher, key)) and key != "diversity"
        ]
        said += f" With {student['nfe']} forwards, where the teacher takes {teacher['nfe']}: {', '.join(compared)}."
    verdict = run.facts.get("hack_monitor")
    return said if verdict is None else f"{said} Hack monitor: {verdict['message']}."


def _last_student(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The student's row with most forwards."""
    mine = [row for row in rows if row["name"].startswith("student")]
    return max(mine, key=lambda row: int(row["nfe"]), default=None)


def _table(runs: Mapping[str, FinishedRun]) -> Section | None:
    columns = _columns(runs.values())
    several = len(runs) > 1
    rows = [
        [f"{label}: {row['name']}" if several else row["name"], str(row["nfe"] or "-")]
        + [_cell(row, key) for key in columns]
        for label, run in runs.items()
        for row in run.facts["rows"]
    ]
    if not rows:
        return None
    facts = next(run.facts for run in runs.values() if run.facts["rows"])
    about = [f"{facts['rows'][0]['samples']} {facts['prompts']}, the same prompts and noise in every row. {SURE}"]
    if facts["space"]:
        about.append(
            f"Distances are between {facts['space']}. They depend on the number of samples: compare only rows of this table."
        )
    if facts["optimised"]:
        about.append("* Training raised this reward. It says how far training went, not how good the images are.")
    if any(row.get("wins") for run in runs.values() for row in run.facts["rows"]):
        about.append("wins: share of the prompts for which the reward of the row is above the teacher's.")
    return Section("Teacher and student", table=[["", "forwards", *columns.values()], *rows], notes=about)


def _columns(runs: Collection[FinishedRun]) -> dict[str, str]:
    """Key of a figure -> heading, for all that some row has."""
    rows = [row for run in runs for row in run.facts["rows"]]
    optimised = {label for run in runs for label in run.facts.get("optimised", ())}
    columns = {"frechet": "Frechet distance", "accuracy": "prompt accuracy"}
    columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    for label in dict.fromkeys(label for row in rows for label in row["rewards"]):
        columns[label] = f"{label}{'*' if label in optimised else ''}"
        if any(label in row.get("wins", {}) for row in rows):
            columns[f"wins/{label}"] = f"{label} wins"
    return columns | ({"diversity": "diversity"} if any("diversity" in row for row in rows) else {})


def _value(row: Mapping[str, Any], key: str) -> float | None:
    if key.startswith("wins/"):
        return row.get("wins", {}).get(key.removeprefix("wins/"))
    value: float | None = row.get(key, row["rewards"].get(key))
    return value


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = _value(row, key)
    if value is None:
        return "-"
    margin = row.get("margins", {}).get(key)
    return (f"{value:.4g}" if key == "frechet" else f"{value:.3f}") + ("" if margin is None else f" ± {margin:.3f}")


def _pictures(runs: Mapping[str, FinishedRun]) -> Section | None:
    there = [(label, run.path / "grid.png") for label, run in runs.items() if (run.path / "grid.png").is_file()]
    text = ["The same prompts in every column, and the same noise in every row of a grid."]
    return Section("Samples", text, pictures=there) if there else None


def _curves(runs: Mapping[str, FinishedRun]) -> Section | None:
    records = {label: read_metrics(RunDirectory(run.path).metrics) for label, run in runs.items()}
    keys = dict.fromkeys(key for steps in records.values() for step in steps for key in step)
    titles = {key: f"{key.removeprefix('reward/')}: reward of candidates" for key in keys if key.startswith("reward/")}
    plots = []
    for key, title in (titles | CURVES).items():
        curves: list[Curve] = []
        for colour, (label, steps) in enumerate(records.items()):
            points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                if key == "monitor/verdict":
                    curves.append(Curve(label, x, y, colour=colour))
                else:
                    mean = smoothed(y, max(1, min(SMOOTHING, len(y) // 10)))
                    curves += [Curve(label, x, y, colour=colour, faint=True), Curve(label, x, mean, colour=colour)]
        if curves:
            plots.append(plot(title, "step", curves))
    return Section("Training", plots=plots) if plots else None


def _making(labelled: tuple[str, FinishedRun]) -> Section:
    label, run = labelled
    config = read_run_config(run.path)
    used = json.loads(RunDirectory(run.path).versions.read_text(encoding="utf-8"))[-1]
    libraries = ", ".join(f"{name} {version}" for name, version in used.items())
    text = [f"Seed {config.seed}. {libraries}."]
    notes = [
        f"Settings that differ from the defaults. All are in {run.path / 'config.yaml'}, which starts the same run again."
    ]
    return Section(f"How {label} was made", text, code=dump_changes(config).rstrip(), notes=notes)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
