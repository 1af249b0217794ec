"""docs/metrics.md, to be compared with what runs write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
REWARD_TRAINING = "Training a reward"


def documented(reward_training: bool = False) -> dict[str, re.Pattern[str]]:
    """Names in the page's tables, with what they match; those of reward training stand in a section of their own."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        if section.startswith(REWARD_TRAINING) == reward_training:
            for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
                for name in re.findall(r"`([^`]+)`", row):
                    found[name] = re.compile("[^/]+".join(map(re.escape, re.split(r"<\w+>", name))))
    return found


def undocumented(names: Iterable[str], reward_training: bool = False) -> list[str]:
    """Written names that the page does not explain."""
    patterns = documented(reward_training).values()
    return [name for name in names if name != "step" and not any(pattern.fullmatch(name) for pattern in patterns)]


def unwritten(names: Iterable[str], reward_training: bool = False) -> list[str]:
    """Explained names that none of the written ones has."""
    patterns = documented(reward_training).items()
    return [name for name, pattern in patterns if not any(map(pattern.fullmatch, names))]
