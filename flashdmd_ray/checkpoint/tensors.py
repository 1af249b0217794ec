"""Named tensors in safetensors files, here or in a store."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdmd_ray.checkpoint.manifest import MANIFEST, DamagedCheckpoint, check_same, describe, read_manifest
from flashdmd_ray.run.files import new_mode
from flashdmd_ray.run.storage import Location, RemotePath


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, any device, by name as one safetensors file; the umask decides its permissions.

    Raises OSError when it cannot be written.
    """
    mode = new_mode(path.parent)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk arrives as one too
        raise OSError(f"{path.name}: {str(error).removeprefix('Error while serializing: ')}") from None
    path.chmod(mode)


def load_tensors(path: Location) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file, on the CPU.

    A file in a store is fetched first, and must be what its checkpoint's manifest says. Raises DamagedCheckpoint, a ValueError, naming
    the file when it is missing or damaged.
    """
    if isinstance(path, RemotePath):
        return _fetch_tensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"cannot read the tensors in {path}: {error}") from None


def _fetch_tensors(path: RemotePath) -> dict[str, Tensor]:
    folder = path.parent
    manifest = read_manifest(folder)
    if path.name not in manifest.files:
        raise DamagedCheckpoint(f"cannot read the tensors in {path}: {MANIFEST} does not name it")
    with tempfile.NamedTemporaryFile(prefix="flashdmd-", suffix=".safetensors") as file:
        try:
            path.download(file)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"cannot read the tensors in {path}: {error}") from None
        file.flush()
        check_same(manifest.files[path.name], describe(path.name, Path(file.name)), folder)
        return load_tensors(Path(file.name))  # mapped into memory: the tensors outlive the file's name
