"""Files and directories that are named by a path or on the hub, downloaded where they are not here yet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from flashdmd_ray.models.stock_modules import load_part

_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<inside>[\w./-]+))?")


def find_file(path: str, names: Sequence[str]) -> Path:
    """The file at `path`: itself, the first of `names` in that directory or hub repository, or 'owner/name/file' on the hub.

    Raises ValueError, one line naming the path and the remedy, when there is none.
    """
    if Path(path).is_file():
        return Path(path)
    if Path(path).is_dir():
        files = [Path(path) / name for name in names if (Path(path) / name).is_file()]
        if not files:
            raise ValueError(f"{path} holds none of {', '.join(names)}; choose the file itself, or download it")
        return files[0]
    return Path(load_part(path, "", lambda: _download(path, names)))


def _download(path: str, names: Sequence[str]) -> str:
    parts = _HUB.fullmatch(path)
    if parts is None:
        raise ValueError("no such file or directory")
    candidates = [parts["inside"]] if parts["inside"] else list(names)
    for name in candidates[:-1]:
        try:
            return hf_hub_download(parts["repository"], name)
        except EntryNotFoundError:
            continue
    return hf_hub_download(parts["repository"], candidates[-1])


def find_directory(path: str) -> Path:
    """The directory at `path`, or 'owner/name/folder' on the hub. Raises ValueError as `find_file` does."""
    if Path(path).is_dir():
        return Path(path)

    def download() -> Path:
        parts = _HUB.fullmatch(path)
        if parts is None:
            raise ValueError("no such directory")
        inside = parts["inside"] or ""
        root = snapshot_download(parts["repository"], allow_patterns=f"{inside}/*" if inside else None)
        if not (Path(root) / inside).is_dir():
            raise ValueError(f"the repository has no folder {inside}")
        return Path(root) / inside

    return Path(load_part(path, "", download))
