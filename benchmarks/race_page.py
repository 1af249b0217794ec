"""Page of a race, `race.html`: final figures, cost to reach the rival's, curves of quality against cost, samples side by side.

python benchmarks/race_page.py [FOLDER]      # where benchmarks/race.py has left its results
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from race import COSTS, METHODS, ROOT, Runs, costs_to_reach, final_figures, read_runs
from safetensors import safe_open

from flashdmd_ray.results.grid import write_grid
from flashdmd_ray.results.page import Curve, Section, plot, write_page

FIGURES = {"frechet": "Frechet distance", "accuracy": "prompt accuracy"}
AXES = {
    "updates": "generator updates",
    "samples": "samples drawn for training",
    "forwards": "operations, in forwards of the teacher",
}


def write_race_page(folder: Path, runs: Runs) -> Path:
    """Write `race.html` and the grid it shows; returns its path."""
    reach, grid = costs_to_reach(runs), pictures(folder, runs)
    sections = [
        Section(
            "At the end of training", table=final_figures(runs), notes=["Mean over seeds +- half its 95 % interval."]
        ),
        Section("Cost to reach DMD2's last figures", table=reach if len(reach) > 1 else (), notes=[REACHING]),
        Section("Quality against cost", plots=curves(runs), notes=["Median of the seeds; the band is their range."]),
        Section("The same prompts and noise", pictures=[] if grid is None else [("students of the first seed", grid)]),
        Section("Settings", code=settings(runs)),
    ]
    return write_page(folder / "race.html", "Distillation methods on the demo world", lead(runs), sections)


REACHING = (
    "Shares of what DMD2 spent until its last checkpoint: until a checkpoint of the method has DMD2's last Frechet distance and prompt "
    "accuracy. Median [lowest, highest] of the seeds; never: a seed did not get there."
)


def lead(runs: Runs) -> list[str]:
    """Two sentences: the methods of the race, and how Flash-DMD came out."""
    seeds = {name: len(of) for name, of in runs.items()}
    raced = ", ".join(f"{name} (seeds: {count})" for name, count in seeds.items())
    said = [f"One teacher, four-step students, the same networks, data, batch and evaluation: {raced}."]
    found = {row[0]: row for row in costs_to_reach(runs)[1:]}
    if "flash" in found:
        said.append(
            f"Share of DMD2's operations until Flash-DMD has its last figures, median and range: {found['flash'][4]}."
        )
    return said


def curves(runs: Runs) -> list[str]:
    """Each figure against each cost, without the first checkpoint, which has cost nothing."""
    plots = []
    for figure, title in FIGURES.items():
        for cost in COSTS:
            drawn = [curve(colour, name, of, cost, figure) for colour, (name, of) in enumerate(runs.items())]
            plots.append(plot(title, AXES[cost], drawn, x_scale="log"))
    return plots


def curve(colour: int, name: str, of: Mapping[int, Sequence[Mapping[str, Any]]], cost: str, figure: str) -> Curve:
    points = list(zip(*(rows[1:] for rows in of.values()), strict=True))
    values = [[float(row[figure]) for row in point] for point in points]
    x = [float(point[0][cost]) for point in points]
    return Curve(
        name, x, [statistics.median(v) for v in values], [min(v) for v in values], [max(v) for v in values], colour
    )


def pictures(folder: Path, runs: Runs) -> Path | None:
    """A grid of the methods' students on the same prompts and noise; None where no method has left images."""
    rows, texts = [], []
    for name, of in runs.items():
        file = folder / f"{name}-{min(of)}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as kept:
                rows.append((name, kept.get_tensor("images")))
                texts = json.loads(kept.metadata()["prompts"])
    return write_grid(folder / "race.png", rows, texts) if rows else None


def settings(runs: Runs) -> str:
    """A line for each method: what its runs set."""
    lines = []
    for name, of in runs.items():
        first = next(iter(of.values()))
        lines.append(
            f"{name}: {first[-1]['updates']} updates, {' '.join((*METHODS[name].settings, *first[0]['settings']))}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "race"
    print(f"page: {write_race_page(folder, read_runs(folder))}")
