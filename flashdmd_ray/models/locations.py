"""Location of a model: a directory, a file, or a repository of the hub. One resolver for the checks and the loaders. Imports no torch.

`model.teacher` and its kind name 'demo', a local path, or owner/name on the hub, with a revision (owner/name@v1) and a file or folder in
it (owner/name/folder) where wanted. What is in the hub's cache is used as it is, without asking the hub again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flashdmd_ray.demo import weights_path
from flashdmd_ray.models.headers import ModelFileError
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, choose, shards

_HUB = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>[\w./-]+))?")
_SMALL = (".json", ".txt", ".model")
"""Ends of the files that are no weights and are downloaded with them: configurations and tokenizers."""


@dataclass(frozen=True)
class HubPath:
    """A repository of the hub. inside: a file or folder in it; empty for the repository itself."""

    repository: str
    revision: str = "main"
    inside: str = ""

    @classmethod
    def parse(cls, path: str) -> HubPath | None:
        """None when the path has another form than owner/name[@revision][/inside]."""
        match = _HUB.fullmatch(path)
        return None if match is None else cls(match["repository"], match["revision"] or "main", match["inside"] or "")

    def snapshot(self) -> Path | None:
        """The copy of the revision in the hub's cache; without a reference to it the newest copy. None when there is none."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"
        snapshots = cache / "snapshots"
        reference = cache / "refs" / self.revision
        if reference.is_file():
            root = snapshots / reference.read_text(encoding="utf-8").strip()
            return root if root.is_dir() else None
        if (snapshots / self.revision).is_dir():
            return snapshots / self.revision
        if self.revision != "main" or not snapshots.is_dir() or any(cache.glob("refs/main")):
            return None
        copies = sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime)
        return copies[-1] if copies else None


def resolve(path: str, demo: str | None = None) -> str:
    """`path` itself, or the directory of that part of the demo weights where it says 'demo'."""
    return str(weights_path(demo)) if path == "demo" and demo is not None else path


def local(path: str) -> Path | None:
    """The file or directory that `path` names, if it is on this machine: itself, or in the hub's cache."""
    if Path(path).exists():
        return Path(path)
    hub = HubPath.parse(path)
    root = None if hub is None else hub.snapshot()
    if hub is None or root is None or not (root / hub.inside).exists():
        return None
    return root / hub.inside


def explain(path: str) -> str:
    """One line on why `path` is no directory of a model, with the remedy."""
    if re.match(r"\w+://", path):
        hub = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path)
        remedy = f"write the hub id {hub[1]}, or download it" if hub else "download it"
        return f"{path} is an address, which is not read; {remedy} and name the directory"
    file = Path(path)
    if file.is_symlink() and not file.exists():
        return f"{path} is a link to something that is gone; correct the path"
    if not file.is_file():
        return f"no such directory: {path!r}; correct the path"
    if file.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return f"{path} is a pickled file, which could execute anything and is not read; convert it to .safetensors"
    if file.suffix == ".gguf":
        return f"{path} holds quantised weights (GGUF); use the model's float32, bfloat16 or float16 file"
    if file.suffix in (".zip", ".tar", ".gz", ".7z"):
        return f"{path} is an archive; unpack it and name the directory"
    return f"{path} is one file; name the directory with its config.json"


def fetch(path: str, folder: str, whole: Callable[[Path], object], stem: str | None = None) -> Path:
    """The directory that `path` names on this machine, with everything in its sub-folder `folder`, downloaded where that is missing.

    whole: raises ValueError when the sub-folder, its argument, lacks something. stem: how its weights are called; None when they are not
    needed. Raises what `whole` raises, ValueError for a path that is nothing, and huggingface_hub's errors.
    """
    root, hub = local(path), HubPath.parse(path)
    if Path(path).exists() or hub is None:
        if root is None or not root.is_dir():
            raise ModelFileError(explain(path))
        return root
    try:
        if root is None:
            raise ModelFileError(f"{path} is not on this machine")
        whole(root / folder)
    except ValueError:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE and root is not None:
            raise
        _download_folder(hub, folder, stem)
        root = local(path)
        if root is None:
            raise ModelFileError(f"the repository {hub.repository} has no folder {hub.inside or folder}") from None
    return root


def _download_folder(hub: HubPath, folder: str, stem: str | None) -> None:
    """Bring the small files of a folder, and its weights if a stem is given, into the hub's cache."""
    where = PurePosixPath(hub.inside) / folder
    names = _names(hub)
    own = [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == where]
    chosen = [name for name in own if name.endswith(_SMALL)]
    choice = None if stem is None else choose(own, stem, f"{hub.repository}/{where}")
    if choice is not None:
        chosen.append(choice.file)
    root = _download(hub, [str(where / name) for name in dict.fromkeys(chosen)])
    if choice is not None and choice.is_index:
        weights = json.loads((root / where / choice.file).read_text(encoding="utf-8"))["weight_map"]
        _download(hub, [str(where / name) for name in sorted(set(weights.values()))])
        shards(root / where / choice.file)


def _names(hub: HubPath) -> list[str]:
    """Names of a repository's files, by the one request that the library does not try again for half a minute without a network."""
    from huggingface_hub import HfApi

    return [
        file.rfilename for file in HfApi().model_info(hub.repository, revision=hub.revision, timeout=10).siblings or ()
    ]


def _download(hub: HubPath, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=list(names)))


def fetch_file(path: str, names: Sequence[str]) -> Path:
    """The file that `path` names: itself, the first of `names` in that directory or hub repository, or owner/name/file on the hub.

    Raises ValueError, one line with the remedy, when there is none, and huggingface_hub's errors.
    """
    found = local(path)
    if found is not None and (found.is_file() or found.is_dir()):
        file = named_file(found, names)
        if file is not None:
            return file
        if Path(path).exists():
            raise ModelFileError(f"{path} holds none of {', '.join(names)}; choose the file itself, or download it")
    hub = HubPath.parse(path)
    if hub is None or Path(path).exists():
        raise ModelFileError(explain(path).replace("directory", "file or directory"))
    files = _names(hub)
    candidates = [hub.inside, *(str(PurePosixPath(hub.inside) / name) for name in names)]
    name = next((candidate for candidate in candidates if candidate in files), None)
    if name is None:
        raise ModelFileError(f"{path} holds none of {', '.join(names)}; choose the file itself")
    return _download(hub, [name]) / name


def named_file(path: Path, names: Sequence[str]) -> Path | None:
    """`path` if it is a file, else the first of `names` in that directory; None when there is none."""
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).is_file()), None)


__all__ = [
    "DIFFUSERS",
    "TRANSFORMERS",
    "HubPath",
    "explain",
    "fetch",
    "fetch_file",
    "local",
    "named_file",
    "resolve",
]
