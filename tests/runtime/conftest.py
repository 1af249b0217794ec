"""The runtime's tests use toy roles, and the simulated ones of the benchmarks, which the workers import by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path[:0] = [HERE, BENCHMARKS]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [HERE, BENCHMARKS, os.environ.get("PYTHONPATH", "")]
)  # inherited by the shared Ray, which starts later
