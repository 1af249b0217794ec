"""Values of the images of a folder: rewards, image embeddings and Inception features, batch by batch, kept in files.

What a stopped command has computed is read by the next one: a file's name tells the judge, the folder and the images it is about.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.data.executor import Executor, MakeWorker, ranges
from flashdmd_ray.models.rewards import ImageFeatures, reward_model
from flashdmd_ray.run.files import new_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PATCH = 299
"""Pixels of the centre that patch FID looks at, without resizing: the size that Inception takes."""

LPIPS_PIXELS = 32
"""Below 31 pixels AlexNet's last layers have nothing to look at."""

Item = tuple[Sequence[str], Sequence[str]]
"""Files of images and their prompts, empty where there are none."""


@dataclass(frozen=True)
class Images:
    """The images of a folder, in the order of their names, and the prompts beside them; none of these where a file lacks its own."""

    folder: Path
    files: tuple[Path, ...]
    prompts: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Images:
        """Raises ValueError for a folder that is not there or has no images."""
        files = tuple(sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES))
        if not files:
            raise ValueError(f"{folder}: there are no images ({', '.join(SUFFIXES)}) in this folder")
        texts = [file.with_suffix(".txt") for file in files]
        with_texts = all(text.is_file() for text in texts)
        prompts = tuple(text.read_text(encoding="utf-8").rstrip("\n") for text in texts) if with_texts else ()
        return cls(folder, files, prompts)


class Judge(Protocol):
    """A model that looks at images. name: of its files. make(): what is called with an `Item`, and returns values by column."""

    @property
    def name(self) -> str: ...

    def make(self) -> Callable[[Item], Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class RewardJudge:
    """A reward: column `score` float32 (B,), and `features` (B, F) where it has embeddings of images. Without prompts only these."""

    reward: RewardConfig
    device: str

    @property
    def name(self) -> str:
        return self.reward.label

    def make(self) -> Callable[[Item], Mapping[str, Tensor]]:
        model = reward_model(self.reward).to(self.device)
        return partial(_rewards, model, self.device)


@torch.inference_mode()
def _rewards(model: Any, device: str, item: Item) -> Mapping[str, Tensor]:
    files, prompts = item
    columns: dict[str, list[Tensor]] = {}
    images = [_pixels(read_image(file)) for file in files]
    for _, group in itertools.groupby(
        range(len(images)), lambda number: images[number].shape
    ):  # photographs differ in size
        rows = list(group)
        batch = torch.stack([images[row] for row in rows]).to(device).float() / 127.5 - 1
        if prompts:
            columns.setdefault("score", []).append(model.score(batch, [prompts[row] for row in rows]))
        if isinstance(model, ImageFeatures):
            columns.setdefault("features", []).append(model.features(batch))
    return {name: torch.cat(parts).float().cpu() for name, parts in columns.items()}


@dataclass(frozen=True)
class InceptionJudge:
    """FID's Inception network from a file of weights: columns `features` (B, 2048), and `patches` of the uncropped centre.

    resize: pixels to which the centre square is brought first, with LANCZOS, as DMD2 does (512 for SDXL); None leaves images whole.
    """

    weights: str
    resize: int | None
    patches: bool
    device: str
    name: str = "inception"

    def make(self) -> Callable[[Item], Mapping[str, Tensor]]:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            state = torch.load(self.weights, weights_only=True, map_location="cpu")
        except OSError:
            raise ValueError(f"--inception: there is no file {self.weights}") from None
        with tempfile.NamedTemporaryFile(suffix=".pth") as checked:  # the library unpickles whatever it is given
            torch.save(state, checked.name)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked.name)
        return partial(_inception, network.to(self.device), self)


@torch.inference_mode()
def _inception(network: Any, judge: InceptionJudge, item: Item) -> Mapping[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for file in item[0]:
        image = read_image(file)
        views = {"features": image if judge.resize is None else ImageOps.fit(image, (judge.resize,) * 2, _LANCZOS)}
        if judge.patches:
            if min(image.size) < PATCH:
                raise ValueError(
                    f"{file}: patch FID needs {PATCH} pixels on each side, it has {image.size}; leave --patches out"
                )
            left, top = ((side - PATCH) // 2 for side in image.size)
            views["patches"] = image.crop((left, top, left + PATCH, top + PATCH))
        for name, view in views.items():
            columns.setdefault(name, []).append(network(_pixels(view)[None].to(judge.device))[0])
    return {name: torch.cat(parts).float().cpu() for name, parts in columns.items()}


@dataclass(frozen=True)
class LpipsJudge:
    """LPIPS (arXiv 1801.03924) on AlexNet: column `diversity` (B,), an image's mean distance to the others of its prompt, else NaN.

    weights: torchvision's file of AlexNet. resize: as for `InceptionJudge`.
    """

    weights: str
    resize: int | None
    device: str
    name: str = "lpips"

    def make(self) -> Callable[[Item], Mapping[str, Tensor]]:
        from lpips import LPIPS

        with warnings.catch_warnings(action="ignore"):  # torchvision deprecated how the package asks it for the network
            network = LPIPS(net="alex", pnet_rand=True, verbose=False)  # it comes with the linear layers only
        state = torch.load(self.weights, weights_only=True, map_location="cpu")
        layers = {name.split(".", 1)[1]: value for name, value in network.net.state_dict().items()}
        wrong = [name for name, value in layers.items() if _shape(state.get(f"features.{name}")) != value.shape]
        if wrong:
            raise ValueError(
                f"--lpips {self.weights}: not torchvision's AlexNet (features.{wrong[0]}); its file is alexnet-owt-7be5be79.pth"
            )
        for name, value in layers.items():
            value.copy_(state[f"features.{name}"])
        return partial(_lpips, network.to(self.device), self)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@torch.inference_mode()
def _lpips(network: Any, judge: LpipsJudge, item: Item) -> Mapping[str, Tensor]:
    files, prompts = item
    means: list[Tensor] = []
    for _, numbers in itertools.groupby(range(len(files)), lambda number: prompts[number]):
        names = [files[number] for number in numbers]
        images = [read_image(name) for name in names]
        if judge.resize is not None:
            images = [ImageOps.fit(image, (judge.resize,) * 2, _LANCZOS) for image in images]
        if min(min(image.size) for image in images) < LPIPS_PIXELS or len({image.size for image in images}) > 1:
            raise ValueError(
                f"{names[0]}: LPIPS needs images of one size and {LPIPS_PIXELS} pixels or more: add --resize 64"
            )
        pixels = torch.stack([_pixels(image) for image in images]).to(judge.device).float() / 127.5 - 1
        sums = torch.zeros(len(images))
        for row in range(len(images) - 1):
            distances = network(pixels[row].expand_as(pixels[row + 1 :]), pixels[row + 1 :]).flatten().cpu()
            sums[row] += distances.sum()
            sums[row + 1 :] += distances
        means.append(sums / (len(images) - 1 or math.nan))
    return {"diversity": torch.cat(means)}


_LANCZOS = Image.Resampling.LANCZOS


def read_image(file: str) -> Image.Image:
    """Raises ValueError, with the file's name, for one that cannot be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); draw it again, or remove it with its prompt") from None


def _pixels(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def judged(
    judge: Judge,
    images: Images,
    cache: Path,
    executor: Executor,
    batch: int = 50,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """The judge's columns for all images. Each batch is a file below `cache`; those that are there are read."""
    folder = cache / f"{judge.name}-{_key(judge, images)}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = _batches(images, batch)
    files = [folder / f"{start:06}-{stop:06}.safetensors" for start, stop in parts]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    items = [_item(images, *parts[number]) for number in missing]
    make: MakeWorker = judge.make
    for number, columns in zip(missing, executor(make, items, workers) if items else (), strict=True):
        with new_file(files[number]) as unfinished:
            save_file(dict(columns), unfinished)
        say(f"{judge.name}: {parts[number][1]:,} of {len(images.files):,} images of {images.folder}")
    read = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in read]) for name in read[0]}


def _batches(images: Images, batch: int) -> list[tuple[int, int]]:
    """Parts (start, stop) of at most `batch` images, or of one prompt: neighbours of one prompt are never parted."""
    if not images.prompts:
        return ranges(len(images.files), batch)
    parts: list[tuple[int, int]] = []
    stop = 0
    for _, neighbours in itertools.groupby(images.prompts):
        start, stop = stop, stop + len(list(neighbours))
        if parts and stop - parts[-1][0] <= batch:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts


def _item(images: Images, start: int, stop: int) -> Item:
    return [str(file) for file in images.files[start:stop]], images.prompts[start:stop]


def _key(judge: Judge, images: Images) -> str:
    """Twelve hexadecimal digits of what the values depend on: the judge, and names, sizes, times and prompts of the images."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in images.files]
    text = json.dumps([repr(judge), str(images.folder.resolve()), stats, images.prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
