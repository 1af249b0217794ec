"""Checkpoints that are either complete or not there.

A checkpoint is a directory `step-00000050` of safetensors and JSON files. It is written under a temporary name, flushed to the disk, listed
with sizes and SHA-256 sums in `manifest.json` (the last file written) and only then renamed: a process killed at any moment leaves the
checkpoints before it as they were. "Newest" means written last, not the largest step: a run continued from an earlier step writes newer
checkpoints with smaller steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})(\.\d+)?")
_TEMPORARY = ".unfinished-"


def write_checkpoint(
    root: Path, step: int, *writers: Callable[[Path], None], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint under `root` and return its directory.

    writers: each is given the (temporary) directory and writes files of its own there, in this process or another one.
    state: JSON, the driver's own part. keep: how many checkpoints to leave, this one included (>= 1).
    A writer's exception passes through and leaves nothing behind. One process writes to a root at a time: what an earlier one left
    unfinished is removed. Raises OSError when the directory cannot be written.
    """
    assert keep >= 1
    assert step >= 0
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}step-{step:08d}-", dir=root))
    try:
        for writer in writers:
            writer(temporary)
        (temporary / STATE).write_text(json.dumps(dict(state), indent=1, sort_keys=True))
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide a checkpoint from the user's group
        _seal(temporary, step, serial=1 + max((_serial(p) or 0 for p in _directories(root)), default=0))
        final = _rename(temporary, root, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [p for p in _newest_first(root) if _serial(p) is not None][keep:]:
        shutil.rmtree(old.rename(root / f"{_TEMPORARY}{old.name}"))  # never half a directory under a checkpoint's name
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest; None when there is none.

    A damaged newer one is named in a warning and skipped.
    """
    for path in _newest_first(root):
        try:
            return verify_checkpoint(path)
        except ValueError as error:
            logger.warning("skipped a damaged checkpoint: %s; delete %s to silence this", error, path)
    return None


def verify_checkpoint(path: Path) -> Path:
    """Return `path` if it is a complete checkpoint; raises ValueError naming the file that is missing or differs."""
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: name a directory such as runs/demo/checkpoints/step-00000050")
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path}: {name} is missing; use another checkpoint")
        if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            raise ValueError(
                f"checkpoint {path}: {name} is not what was written (size or SHA-256 differs); use another checkpoint"
            )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The driver's JSON of a checkpoint. Raises ValueError when it cannot be read."""
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: cannot read {STATE} ({error}); use another checkpoint") from None
    assert isinstance(state, dict)
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, any device, by name as one safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises ValueError naming the file when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the tensors in {path}: {error}") from None


def _seal(directory: Path, step: int, serial: int) -> None:
    """Flush every file to the disk, then write and flush the manifest that names them."""
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        _flush(file)
        files[file.relative_to(directory).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {"format": FORMAT, "step": step, "serial": serial, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(directory / MANIFEST)
    for folder in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _flush(folder)


def _rename(temporary: Path, root: Path, step: int) -> Path:
    """Give the finished directory its name. One of the same step is never replaced: there must be no moment without it."""
    final, attempt = root / f"step-{step:08d}", 1
    while final.exists():
        final, attempt = root / f"step-{step:08d}.{attempt}", attempt + 1
    temporary.rename(final)
    _flush(root)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _directories(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))


def _newest_first(root: Path) -> list[Path]:
    """Checkpoint directories by serial; one whose manifest cannot be read comes first, so that it is noticed."""
    serials = {path: _serial(path) for path in _directories(root)}
    return sorted(serials, key=lambda p: (serials[p] is None, serials[p] or 0, p.name), reverse=True)


def _serial(path: Path) -> int | None:
    try:
        return int(_read_manifest(path)["serial"])
    except ValueError:
        return None


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError when the manifest is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        known = manifest["format"] == FORMAT and manifest["serial"] >= 1
        known = known and all({"bytes", "sha256"} <= set(entry) for entry in manifest["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: cannot read {MANIFEST} ({error}); use another checkpoint") from None
    if not known:
        raise ValueError(
            f"checkpoint {path}: {MANIFEST} has a format this version does not know; use another checkpoint"
        )
    return dict(manifest)
