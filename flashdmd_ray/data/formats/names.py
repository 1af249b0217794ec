"""The rule that puts files together: an image and the caption of the same name, in archives and in folders alike."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashdmd_ray.data.pixels import OTHER_SUFFIXES, SUFFIXES
from flashdmd_ray.data.sample import DUPLICATE, MISSING_IMAGE, SYSTEM_FILE, Bad, Ignored

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""The likeliest first."""
SEVERAL_IMAGES = "several images for one caption; data.image names the suffix of the right one"
FURTHER_IMAGE = "further image of a sample"
NOT_WANTED = "image of another suffix than data.image"
ABSENT_SHARD = "file that is not there, by the number in the names of the others"
NO_CAPTION = "text about the data set"
OTHER_LIST = "list of captions that is not read; name it metadata.jsonl, .csv or .parquet, with file_name and text"
_ABOUT = ("readme", "license", "licence", "notice", "copying", "changelog", "attribution", "credits", "citation")
_LISTS = ("metadata", "meta_cap", "meta_lat", "captions", "prompts", "annotations", "dataset", "index")
"""Names, without suffix, of text and JSON files that are no caption unless an image is called so too."""
_SYSTEM = (
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "@eadir",
    "$recycle.bin",
    "system volume information",
)


@dataclass(frozen=True)
class Group:
    """One sample. image, captions: positions in the list of names; captions by suffix."""

    key: str
    image: int
    captions: dict[str, int] = field(default_factory=dict)


def is_system_file(name: str) -> bool:
    """True for what operating systems leave in folders and archives: hidden files, ._x.jpg of a Mac, Thumbs.db, __MACOSX/..."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in parts)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """Files with one of these suffixes, in any letter case, anywhere below a folder; sorted, without those of operating systems."""
    paths = (path for path in folder.rglob("*") if path.name.lower().endswith(suffixes) and path.is_file())
    return tuple(sorted(path for path in paths if not is_system_file(str(path.relative_to(folder)))))


def absent_shards(files: Sequence[Path]) -> Iterator[Ignored]:
    """Shards such as train-00001-of-00003.parquet that are missing among those that are there."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d{1,6})-of-(\d{1,6})(\..*)", str(file)):
            found.setdefault((match[1], match[3], match[4]), set()).add(match[2])
    for (start, count, suffix), numbers in found.items():
        width = len(next(iter(numbers)))
        for number in range(int(count)):
            if f"{number:0{width}}" not in numbers:
                yield Ignored(f"{Path(start).name}-{number:0{width}}-of-{count}{suffix}", ABSENT_SHARD)


def same_name(name: str) -> str:
    """Equal for names that look equal: letters with accents are one character or two, depending on who wrote them."""
    return unicodedata.normalize("NFC", name)


def group_files(names: Sequence[str], image_suffix: str | None = None) -> Iterator[Group | Bad | Ignored]:
    """Samples among files, in the order of their images; what is left over, and why.

    An image goes with the caption of its own name up to the last dot: shot.01.jpg with shot.01.txt. One without takes the caption of a
    shorter name, as in WebDataset: y.seg.png takes y.json, unless there is y.jpg. image_suffix: only images that end so are samples.
    """
    captions: dict[tuple[str, int], dict[str, int]] = {}
    images: list[
        tuple[int, str, int]
    ] = []  # position, name without the last suffix, how many of the same name came before
    copies: Counter[str] = Counter()
    for position, name in enumerate(names):
        stem, suffix = _split(name)
        if is_system_file(name):
            yield Ignored(name, SYSTEM_FILE)
        elif name.endswith("_stats.json"):
            yield Ignored(name, "neither image nor caption (statistics of img2dataset)")
        elif suffix in CAPTION_SUFFIXES:
            captions.setdefault((stem, copies[name]), {})[suffix] = position
        elif suffix not in (*SUFFIXES, *OTHER_SUFFIXES):
            yield Ignored(name, f"neither image nor caption ({suffix or 'no suffix'})")
        elif image_suffix is not None and not name.lower().endswith(f".{image_suffix.lower().lstrip('.')}"):
            yield Ignored(name, NOT_WANTED)
        else:
            images.append((position, stem, copies[name]))
        copies[name] += 1
    owners: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for position, stem, copy in images:
        owner = next((name for name in _caption_names(names[position]) if (name, copy) in captions), stem)
        owners.setdefault((owner, copy), []).append((position, stem))
    for (owner, copy), members in owners.items():
        yield from _group(owner, copy, members, captions.pop((owner, copy), {}), names)
    for (stem, copy), texts in captions.items():
        base = stem.rpartition("/")[2].lower()
        if base in _ABOUT or base in _LISTS:
            yield from (
                Ignored(names[position], NO_CAPTION if base in _ABOUT else OTHER_LIST) for position in texts.values()
            )
        else:
            yield Bad(stem, MISSING_IMAGE if not copy else DUPLICATE)


def _group(
    owner: str, copy: int, members: Sequence[tuple[int, str]], captions: dict[str, int], names: Sequence[str]
) -> Iterator[Group | Bad | Ignored]:
    """The images that go with one caption: one of them is the sample, or nobody knows which."""
    exact = [position for position, stem in members if stem == owner]
    chosen = exact or [position for position, _ in members]
    chosen = [position for position in chosen if _split(names[position])[1] in SUFFIXES] or chosen
    for position, _ in members:
        if position not in chosen:
            yield Ignored(names[position], FURTHER_IMAGE)
    if len(chosen) > 1:
        yield from (Bad(names[position], SEVERAL_IMAGES) for position in chosen)
    elif copy:
        yield Bad(owner, DUPLICATE)
    else:
        yield Group(owner, chosen[0], captions)


def _split(name: str) -> tuple[str, str]:
    """("a/shot.01", ".jpg") of "./a/shot.01.JPG"."""
    folder, slash, base = same_name(name).removeprefix("./").rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (f"{folder}{slash}{stem}", f".{suffix.lower()}") if dot else (f"{folder}{slash}{base}", "")


def _caption_names(name: str) -> Iterator[str]:
    """Names that the caption of an image may have, the likeliest first: all of it but the last suffix, all of it, shorter ones."""
    stem, _ = _split(name)
    yield stem
    yield same_name(name).removeprefix("./")
    folder, slash, base = stem.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if base:
            yield f"{folder}{slash}{base}"
