"""Model folders with real safetensors files of chosen sizes, for what is checked before loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

PARTS = {"unet": 1000, "vae": 200, "text_encoder": 30, "text_encoder_2": 40}


def write_model(folder: Path, parameters: int, file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": np.zeros((parameters - 10,), np.float32), "b": np.zeros((5, 2), np.float16)}, folder / file)
    return folder


def write_pipeline(folder: Path) -> Path:
    for part, parameters in PARTS.items():
        write_model(
            folder / part,
            parameters,
            "diffusion_pytorch_model.safetensors" if part in ("unet", "vae") else "model.safetensors",
        )
    (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": 8, "in_channels": 4}))
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8]}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "scaled_linear"}))
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    return folder


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")


def model_settings(root: Path) -> dict[str, object]:
    """Configuration that points every model at folders below `root`, which are written here."""
    write_model(root / "sam", 500)
    write_tokenizer(write_model(root / "clip", 60))
    write_model(root / "lrm", 70)
    (root / "images").mkdir()
    Image.new("RGB", (24, 24)).save(root / "images" / "a.png")
    (root / "images" / "a.txt").write_text("a red 4")
    return {
        "data": {"source": str(root / "images")},
        "model": {"teacher": str(write_pipeline(root / "teacher")), "sam": str(root / "sam")},
        "rewards": [{"kind": "pickscore", "path": str(root / "clip")}, {"kind": "latent", "path": str(root / "lrm")}],
        "run": {"dir": str(root / "runs"), "name": "first"},
    }
