"""A tiny SD3-form teacher, pairs of pictures in Pick-a-Pic's columns, and a configuration that trains on them in a second."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from flashdmd_ray.config import validated
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from tests.tiny import save_sd3

SIDE = 16


def picture(seed: int, suffix: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=suffix)
    return file.getvalue()


def row(number: int, label: float | None = None) -> dict[str, Any]:
    label = float(number % 2) if label is None else label
    pictures = {f"jpg_{which}": picture(2 * number + which) for which in (0, 1)}
    return {"caption": f"scene {number}", **pictures, "label_0": label, "label_1": 1 - label}


def write_pairs(path: Path, rows: list[dict[str, Any]], group: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("teacher") / "sd3")


@pytest.fixture
def configure(tmp_path, teacher) -> Callable[..., RewardTrainingConfig]:
    """configure(run name, further sections...): the tiny job below tmp_path, local unless told otherwise."""
    pairs = write_pairs(tmp_path / "pairs.parquet", [row(number) for number in range(60)])

    def make(name: str = "tiny", **sections: Any) -> RewardTrainingConfig:
        tree: dict[str, Any] = {
            "runtime": "local",
            "steps": 6,
            "batch": 4,
            "run": {"name": name, "dir": str(tmp_path / "runs")},
            "model": {"family": "sd3", "teacher": str(teacher)},
            "pairs": {"source": str(pairs), "held_out": 0.3, "cache": str(tmp_path / "cache")},
            "rewards": [],
            "optimizer": {"lr": 1e-2, "warmup": 2},
            "ema": 0.5,
            "checkpoint": {"every": 2},
            "accuracy": {"timesteps": [0, 999], "batch": 8},
        }
        return validated(RewardTrainingConfig, tree | sections)

    return make
