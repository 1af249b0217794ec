"""`data_report.json` of a run: what the data was, and every bad sample that was left out or replaced."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.datasets import data_report
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.run.files import write_atomically

log = logging.getLogger(__name__)
FILE = "data_report.json"


def start_report(folder: Path, config: DataConfig) -> dict[str, float]:
    """Index the data, write the report, log what is bad; returns metrics. Nothing for the demo source without prompts.

    Raises ValueError for unusable data, and when a resumed run would go on with other data: its order would be another.
    """
    entries = data_report(config)
    if not entries:
        return {}
    path = folder / FILE
    before = _read(path)
    for key, entry in entries.items():
        recorded = before.get(key, {}).get("content", entry["content"])
        if recorded != entry["content"]:
            raise ValueError(
                f"data.{key}: {entry['path']} has changed since this run began, so its order would too; restore it, or choose another "
                f"run.name"
            )
    write_atomically(path, json.dumps(before | entries, indent=1) + "\n")
    metrics: dict[str, float] = {}
    for key, entry in entries.items():
        tally = Tally.from_json(entry)
        metrics |= {f"data/{key}_samples": tally.good, f"data/{key}_bad": tally.bad_count}
        for line in tally.lines():
            log.warning("data.%s: left out: %s", key, line)
        for line in tally.ignored_lines():
            log.warning("data.%s: no sample: %s", key, line)
    return metrics


def note_replaced(folder: Path, pairs: Iterable[str]) -> None:
    """Add the bad samples that training met, given as "reason<tab>name"; one that is known already is not counted again."""
    path = folder / FILE
    report = _read(path)
    replaced: dict[str, list[str]] = {reason: entry["names"] for reason, entry in report.get("replaced", {}).items()}
    for pair in pairs:
        reason, _, name = pair.partition("\t")
        names = replaced.setdefault(reason, [])
        if name not in names:
            names.append(name)
    if replaced:
        report["replaced"] = {reason: {"count": len(names), "names": names} for reason, names in replaced.items()}
        write_atomically(path, json.dumps(report, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
