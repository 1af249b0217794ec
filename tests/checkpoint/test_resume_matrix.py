"""Resuming on other ranks and ZeRO stages: four cells of the matrix that `python benchmarks/resume_matrix.py` prints, one for each stage
of whole networks and one of adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELLS = [("full", 1), ("full", 2), ("full", 3), ("lora", 3)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    file = tmp_path_factory.mktemp("matrix") / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "resume_matrix.py", "--quick", "--json", file]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert file.exists(), ended.stdout + ended.stderr
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.timeout(960)
@pytest.mark.parametrize(("mode", "stage"), CELLS)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(rows: list[dict[str, object]], mode: str, stage: int) -> None:
    (row,) = [row for row in rows if (row["mode"], row["stage"]) == (mode, stage)]
    assert row["good"], row


def test_every_change_of_ranks_is_among_the_cells(rows: list[dict[str, object]]) -> None:
    assert {row["ranks"] for row in rows} == {"1->2", "2->1", "2->2"}
