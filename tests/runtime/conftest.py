"""The runtime's tests use toy roles, which the workers import by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [HERE, os.environ.get("PYTHONPATH", "")]
)  # inherited by the shared Ray, which starts later
