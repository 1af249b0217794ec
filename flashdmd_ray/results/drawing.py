"""Images of prompts by any text-to-image pipeline of diffusers, in a folder that an interrupted command goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from flashdmd_ray.data.executor import Executor, ranges
from flashdmd_ray.results.export import few_step_scheduler
from flashdmd_ray.results.export_facts import FACTS, read_facts
from flashdmd_ray.roles.image_sampling import seed_of
from flashdmd_ray.run.files import write_atomically

KEY = "drawing.json"
"""Says in a folder how its images are drawn."""
Layout = Literal["pairs", "geneval", "dpg"]


@dataclass(frozen=True)
class Drawing:
    """A pipeline and the settings that it draws with.

    model: a pipeline's directory or hub id, or an export of this package. lora: a file of adapters for it.

    steps, guidance: None is what an export says, else diffusers' default for the pipeline. size: (height, width), None as the model has
    it. seed: image i starts from noise seeded by (seed, i), the same for all models with latents of one shape.
    """

    model: str
    lora: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Drawer:
    """A loaded pipeline. Called with (indices, prompts) of a batch, it returns a PNG file for each."""

    def __init__(self, drawing: Drawing, device: str) -> None:
        from diffusers import AutoPipelineForText2Image
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        facts = read_facts(Path(drawing.model)) if (Path(drawing.model) / FACTS).is_file() else {}
        self._seed = drawing.seed
        self._one_by_one = facts.get("seed") == "torch"
        """The scheduler draws from torch's own generator, so that a batch would share its noise."""
        self._pipeline: Any = AutoPipelineForText2Image.from_pretrained(
            drawing.model, torch_dtype=getattr(torch, drawing.dtype), use_safetensors=True, **facts.get("load", {})
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        if drawing.lora is not None:
            self._pipeline.load_lora_weights(drawing.lora)
        self._call = _call_of_export(facts) | _call_of_drawing(drawing)
        if facts and drawing.steps is not None:
            self._pipeline.scheduler, steps = fewer_steps(self._pipeline.scheduler, facts["timesteps"], drawing.steps)
            self._call = {k: v for k, v in self._call.items() if k not in STEPS} | steps

    @torch.inference_mode()
    def __call__(self, batch: tuple[Sequence[int], Sequence[str]]) -> list[bytes]:
        samples = [(seed_of(self._seed, index), prompt) for index, prompt in zip(*batch, strict=True)]
        groups = [[sample] for sample in samples] if self._one_by_one else [samples]
        return [_png(image) for group in groups for image in self._draw(group)]

    def _draw(self, samples: Sequence[tuple[int, str]]) -> list[Any]:
        if self._one_by_one:
            torch.manual_seed(samples[0][0])
        generators = [torch.Generator().manual_seed(seed) for seed, _ in samples]
        return list(self._pipeline([prompt for _, prompt in samples], generator=generators, **self._call).images)


def fewer_steps(scheduler: Any, timesteps: Sequence[int], steps: int) -> tuple[Any, dict[str, Any]]:
    """Scheduler and arguments for every k-th of a student's timesteps. Raises ValueError when there is no such k."""
    if steps < 1 or len(timesteps) % steps:
        fitting = [n for n in range(1, len(timesteps) + 1) if len(timesteps) % n == 0]
        raise ValueError(f"--steps {steps}: this student has {len(timesteps)} timesteps, so one of {fitting}")
    return few_step_scheduler(scheduler.config, timesteps[:: len(timesteps) // steps])


@dataclass(frozen=True)
class Order:
    """Which images are drawn, `per_prompt` of every prompt, and how they lie in a folder.

    pairs: 000000.png with its prompt in 000000.txt, which training, `flashdmd score` and others read. geneval: GenEval's
    00000/metadata.jsonl, a line of `metadata` for each prompt, and 00000/samples/0000.png. dpg: besides pairs, grids/ID.png for
    DPG-Bench, which has the images of a prompt in two rows; `metadata` are the IDs.
    """

    prompts: Sequence[str]
    per_prompt: int = 1
    layout: Layout = "pairs"
    metadata: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def prompt(self, index: int) -> str:
        return self.prompts[index // self.per_prompt]

    def has(self, out: Path, index: int) -> bool:
        """Return True when image `index` is in the folder. Raises ValueError for one of another prompt."""
        image, (file, text) = self._image(out, index), self._text(out, index)
        if not image.is_file() or (self._completes(index) and not self._grid(out, index).is_file()):
            return False
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            raise ValueError(f"--out: {image} was drawn of another prompt; name another folder")
        return True

    def write(self, out: Path, index: int, image: bytes) -> None:
        """Write an image and its prompt. The image comes last: where it is, the sample is whole."""
        file = self._image(out, index)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(*self._text(out, index))
        write_atomically(file, image)
        if self._completes(index):
            self._write_grid(out, index)

    def _completes(self, index: int) -> bool:
        """Return True when image `index` is the last of a grid."""
        return self.layout == "dpg" and (index + 1) % self.per_prompt == 0

    def _grid(self, out: Path, index: int) -> Path:
        return out / "grids" / f"{self.metadata[index // self.per_prompt]}.png"

    def _write_grid(self, out: Path, last: int) -> None:
        """Two by two images of a prompt in one, or its only image: what DPG-Bench cuts up again."""
        images = [Image.open(self._image(out, index)) for index in range(last + 1 - self.per_prompt, last + 1)]
        columns, (width, height) = (1 if self.per_prompt == 1 else 2), images[0].size
        grid = Image.new("RGB", (columns * width, columns * height))
        for number, image in enumerate(images):
            grid.paste(image, (number % columns * width, number // columns * height))
        file = self._grid(out, last)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, _png(grid))

    def _image(self, out: Path, index: int) -> Path:
        if self.layout != "geneval":
            return out / f"{index:06}.png"
        prompt, sample = divmod(index, self.per_prompt)
        return out / f"{prompt:05}" / "samples" / f"{sample:04}.png"

    def _text(self, out: Path, index: int) -> tuple[Path, str]:
        """The file beside an image, and what it holds."""
        image = self._image(out, index)
        if self.layout != "geneval":
            return image.with_suffix(".txt"), self.prompt(index) + "\n"
        return image.parents[1] / "metadata.jsonl", self.metadata[index // self.per_prompt] + "\n"


def draw(
    drawing: Drawing,
    order: Order,
    out: Path,
    executor: Executor,
    device: str,
    batch: int = 4,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> int:
    """Draw the images of `order` that `out` lacks; returns how many. Raises ValueError when `out` has some drawn in another way."""
    if not (out / KEY).is_file() and out.is_dir() and next(out.iterdir(), None):
        raise ValueError(f"--out: {out} is not empty and has no {KEY}; name another folder")
    check_key(out / KEY, asdict(drawing) | {"layout": order.layout, "per_prompt": order.per_prompt})
    wanted = [index for index in range(len(order)) if not order.has(out, index)]
    items = [
        (wanted[start:stop], [order.prompt(i) for i in wanted[start:stop]])
        for start, stop in ranges(len(wanted), batch)
    ]
    drawn = executor(partial(Drawer, drawing, device), items, workers) if items else iter(())
    done = len(order) - len(wanted)
    for (indices, _), images in zip(items, drawn, strict=True):
        for index, image in zip(indices, images, strict=True):
            order.write(out, index, image)
        done += len(indices)
        say(f"{done:,} of {len(order):,} images")
    return len(wanted)


STEPS = ("num_inference_steps", "timesteps", "sigmas")


def _call_of_export(facts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call that an export names. JSON has no tuples, which SDXL's sizes must be."""
    pairs = ("original_size", "target_size", "crops_coords_top_left")
    return {name: tuple(value) if name in pairs else value for name, value in facts.get("call", {}).items()}


def _call_of_drawing(drawing: Drawing) -> dict[str, Any]:
    height, width = drawing.size or (None, None)
    given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance, "height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def check_key(file: Path, key: Mapping[str, object]) -> None:
    """Write to `file` how the images beside it are drawn. Raises ValueError when those that are there were drawn in another way."""
    text = json.dumps(key, indent=1) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"--out: {file} says that its images were drawn in another way; name another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
