"""Real images for whoever has prompts alone: the teacher draws them once, and a run reads them like any other folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from flashdmd_ray.batch import derive_seed, to_uint8
from flashdmd_ray.config import Config
from flashdmd_ray.data.build import open_prompt_index
from flashdmd_ray.engine.processes import local_device
from flashdmd_ray.results.drawing import check_key
from flashdmd_ray.roles.image_sampling import sample_all_images, teacher_sampler
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.run.files import new_file, write_atomically


def write_teacher_images(config: Config, count: int, out: Path, say: Callable[[str], None]) -> Path:
    """Draw `count` images of `data.prompts` to out/images as 000000.png with 000000.txt; returns that folder.

    Prompts are used again, with other noise, when there are fewer. Teacher, steps and guidance are those of the final table. What is
    there is kept, so that an interrupted call goes on; out/images.json says what it was drawn with.

    Raises ValueError when that was something else, and for a source that is no prompts.
    """
    prompts = open_prompt_index(config.data)
    if prompts is None:
        raise ValueError(
            "--teacher-images: they are drawn from prompts; name a .txt, .jsonl or .parquet file of prompts"
        )
    evaluation = config.evaluation
    key = {
        "teacher": config.model.model_dump(mode="json"),
        "steps": evaluation.teacher_steps,
        "guidance": config.teacher_guidance,
        "seed": config.seed,
        "prompts": prompts.content,
    }
    check_key(out / "images.json", key)
    folder = out / "images"
    folder.mkdir(exist_ok=True)
    texts = prompts.captions(i % len(prompts) for i in range(count))
    family = load_family(config.model, device=local_device())
    sampler = teacher_sampler(family, evaluation.teacher_steps, config.teacher_guidance)
    for start in range(0, count, evaluation.batch):
        numbers = range(start, min(start + evaluation.batch, count))
        if all((folder / f"{number:06}.txt").is_file() for number in numbers):
            continue
        chunk = texts[start : numbers.stop]
        images = sample_all_images(
            family, sampler, chunk, numbers, derive_seed(config.seed, "teacher images"), len(chunk)
        )
        for number, text, pixels in zip(numbers, chunk, to_uint8(images), strict=True):
            with new_file(folder / f"{number:06}.png") as unfinished:
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
            write_atomically(folder / f"{number:06}.txt", text + "\n")  # written last: the sample is whole
        say(f"{numbers.stop:,} of {count:,} images")
    return folder
