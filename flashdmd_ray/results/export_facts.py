"""The facts file of an export: what programs read about it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FACTS = "flashdmd.json"
"""Name of the file. A folder that has one is an export."""
SINGLE_FILE = "flashdmd_model.safetensors"
"""Weights of an export in the original layout."""


def read_facts(export: Path) -> dict[str, Any]:
    """Read an export's facts. Raises ValueError when they are damaged or of another version."""
    try:
        facts = dict(json.loads((export / FACTS).read_text(encoding="utf-8")))
        timesteps = facts["timesteps"]
        falling = all(isinstance(t, int) and 0 <= t < 1000 for t in timesteps) and timesteps == sorted(timesteps)[::-1]
        if not timesteps or not falling or not isinstance(facts["base"], str) or not isinstance(facts["call"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{export / FACTS} is damaged or of another version; export the model again") from None
    return facts
