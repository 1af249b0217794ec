"""Segment Anything before anything is loaded: is the file there, and of which size? Imports no torch."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.config import Config
from flashdmd_ray.models.config_files import check_json
from flashdmd_ray.models.headers import read_header, refuse_stand_in
from flashdmd_ray.models.locations import HubPath, named_file
from flashdmd_ray.models.teacher_files import ModelFiles, inspect
from flashdmd_ray.models.weight_files import TRANSFORMERS, weight_files


def sam_files(config: Config) -> ModelFiles:
    """The Segment Anything checkpoint of the discriminator. Raises ValueError like `teacher_files`."""
    path, hub = Path(config.model.sam), HubPath.parse(config.model.sam)
    if path.suffix in (".pth", ".pt") and not path.exists() and (hub is None or not hub.inside):
        raise ValueError(f"model.sam: {path} does not exist; correct the path or download the checkpoint")
    return inspect("model.sam", config.model.sam, "sam", sam_size)


def sam_size(place: Path) -> dict[str, int]:
    """Parameters of Segment Anything at a file or directory. Raises ModelFileError when it cannot be read."""
    file = named_file(place, ["model.safetensors"])
    if place.is_dir():
        check_json(place / "config.json")
        if file is None:
            weight_files(place, TRANSFORMERS)
    assert file is not None, "weight_files refuses a directory without"
    return {"": file_size(file)}


def file_size(file: Path) -> int:
    """Parameters of a file of weights: counted in safetensors, for a torch file of float32 by its size. Raises ModelFileError."""
    if file.suffix == ".safetensors":
        return sum(read_header(file).sizes.values())
    refuse_stand_in(file)
    return file.stat().st_size // 4
