"""The tables of benchmarks/chaos.py: seconds for each kind of fault, and goodput against the interval of faults."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("detect", "rebuild", "load", "next_step", "lost")


def print_report(out: Path) -> None:
    """Print what OUT/faults.jsonl and OUT/runs.jsonl hold, as Markdown."""
    faults, runs = read(out / "faults.jsonl"), read(out / "runs.jsonl")
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for fault in faults:
        kinds[fault["kind"]].append(fault)
    columns = ("fault", "times", "detect s", "rebuild s", "load s", "next step s", "steps lost", "command given again")
    print(f"{len(faults)} faults in {len(runs)} finished runs\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for kind, struck in sorted(kinds.items()):
        facts = [
            len(struck),
            *(middle(struck, column) for column in COLUMNS),
            sum(len(fault["exits"]) for fault in struck),
        ]
        print(f"| {kind} | {' | '.join(map(str, facts))} |")
    print(
        "\n| seed | steps between faults | steps | bits equal | every step once | left over | goodput |\n|---|---|---|---|---|---|---|"
    )
    for run in runs:
        good = run["steps"] * statistics.median(run["step_s"]) / run["wall"]
        facts = (run["seed"], run["interval"], run["steps"], run["bit_equal"], run["recorded_once"], len(run["left"]))
        print(f"| {' | '.join(map(str, facts))} | {good:.0%} |")
    for run in runs:
        if sizes := [fault["driver_mib"] for fault in faults if fault["seed"] == run["seed"] and "driver_mib" in fault]:
            print(f"seed {run['seed']}: driver {sizes[0]:.0f} MiB at its first fault, {sizes[-1]:.0f} MiB at its last")
    costs = [fault["next_step"] for fault in faults if "next_step" in fault]
    if costs:
        cost = statistics.mean(costs)
        curve = ", ".join(f"{60 * m / (60 * m + cost):.0%} at {m} min" for m in (1, 2, 5, 15, 60, 240))
        print(f"\nmean seconds from a fault to the next step {cost:.1f}; goodput with a fault every so often: {curve}")


def middle(struck: Sequence[Mapping[str, Any]], column: str) -> str:
    """The median, and the largest where that is another."""
    values = [fault[column] for fault in struck if column in fault]
    middle, most = (f"{value:.1f}" for value in (statistics.median(values), max(values))) if values else ("", "")
    return middle if middle == most else f"{middle}, at most {most}"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
