"""The command `flashdmd config new`: a commented configuration for a teacher, images, prompts and the GPUs of this machine.

Exit codes: 0 written, 2 nothing fits, the file is there, or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from flashdmd_ray.config import Config, validated
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.plan.fit import GIB, check_fit
from flashdmd_ray.plan.models import Models, models_of
from flashdmd_ray.plan.parts import parts_of_models
from flashdmd_ray.reference.pages import SCHEMAS
from flashdmd_ray.run.command_line import run_command
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.progress import still


@dataclass(frozen=True)
class Usual:
    """The usual settings of a family: its published teacher, a VAE of its own or '', the teacher's guidance."""

    teacher: str
    vae: str
    guidance: float


USUAL = {
    "sdxl": Usual("stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix", 8.0),
    "sd3": Usual("stabilityai/stable-diffusion-3-medium-diffusers", "", 7.0),
    "sd15": Usual("stable-diffusion-v1-5/stable-diffusion-v1-5", "", 7.5),
}
SAM = "models/sam_vit_b_01ec64.pth"
SAM_URL = "https://github.com/facebookresearch/segment-anything"
DRAWN = "teacher_images"
"""Folder of images that the teacher draws where there are none."""
LADDER = ((None, 8, 4), (None, 4, 1), (768, 4, 1), (512, 4, 1))
"""(pixels of a side, or None for the teacher's own; batch of a GPU; samples at a time): the first that fits is written."""


def new_command(arguments: Sequence[str]) -> int:
    """`flashdmd config new FAMILY --images DIR --prompts FILE ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd config new",
        description="Write a commented configuration for your images, prompts and teacher that fits this machine's GPUs.",
        epilog="Then: flashdmd train FILE --dry-run",
    )
    parser.add_argument("family", choices=USUAL, help="the teacher's family; sd15: also 2.1, sd3: also 3.5")
    parser.add_argument(
        "--images",
        help="real images: a folder with text files beside them, .tar, ... (default: the teacher draws them)",
    )
    parser.add_argument("--prompts", help="prompts, one per line (default: the images' captions)")
    parser.add_argument(
        "--teacher", help="a diffusers folder, a .safetensors file or a hub id (default: the published)"
    )
    parser.add_argument(
        "--teacher-config", help="of a .safetensors file: a pipeline of the same model (default: asked of the hub)"
    )
    parser.add_argument(
        "--sam",
        help=f"Segment Anything's weights (default: {SAM} if it is there, else the discriminator reads latents)",
    )
    parser.add_argument("--gpus", type=int, help="how many GPUs to use (default: those of this machine)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU (default: as found, or 24)")
    parser.add_argument("--out", type=Path, help="the file to write (default: my_FAMILY.yaml)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    out: Path = options.out or Path(f"my_{options.family}.yaml")
    if out.exists():
        raise ValueError(f"--out: {out} is there already; name another file, or remove it")
    if options.images is None and options.prompts is None:
        raise ValueError("--images or --prompts: name one of them, or both")
    for name, path in (("--images", options.images), ("--prompts", options.prompts)):
        if path is not None and not path.startswith("hf:") and not Path(path).exists():
            raise ValueError(f"{name}: {path} does not exist")
    if options.sam is None and Path(SAM).is_file():
        options.sam = SAM
    from flashdmd_ray.plan.measure.device import gpu_memories

    here = [size / GIB for size in gpu_memories()]
    gpus = len(here) if options.gpus is None else options.gpus
    if gpus < 0:
        raise ValueError(f"--gpus {gpus}: must not be negative")
    memory = options.gpu_memory or (min(here) if here else 24.0)
    with still(lambda text: print(text, flush=True), lambda: "still planning and looking at the teacher"):
        text = first_that_fits(options, out.stem, gpus, round(memory - 0.5, 1))
        _try_loading_teacher(validated(Config, yaml.safe_load(text)))
    write_atomically(out, text)
    if options.sam is None:
        print(
            f"{SAM} is not there, so the discriminator reads latents, as in DMD2. With it ({SAM_URL}), write the file anew"
        )
    where = f"{gpus} GPU{'s' if gpus > 1 else ''} of {memory:g} GiB" if gpus else "no GPU: on the CPU, for small models"
    following = f"flashdmd train {out} --dry-run"
    if options.images is None:
        following = (
            f"flashdmd data {options.prompts} --teacher-images 2000 --config {out} --out {DRAWN}, then {following}"
        )
    print(f"{out} is written for {where}; next: {following}")
    return 0


def _try_loading_teacher(config: Config) -> None:
    """Raises ValueError, naming the option, for a teacher that cannot be loaded: one file has no JSON files and tokenizers of its own."""
    try:
        try_loading(config)
    except ValueError as error:
        text = str(error).replace("model.teacher_config:", "--teacher-config:").replace("model.teacher:", "--teacher:")
        raise ValueError(text) from None


def first_that_fits(options: argparse.Namespace, name: str, gpus: int, room: float) -> str:
    """The text of the first configuration of the ladder whose plan fits. room: GiB of one GPU. Raises ValueError when none does."""
    refusal: ValueError | None = None
    for text, config, models in ladder(options, name, gpus, room):
        try:
            check_fit(config, models, parts_of_models(config, models))
        except ValueError as error:
            refusal = error
            continue
        return text
    raise ValueError(f"nothing that this command writes fits into {room:g} GiB: {refusal}")


def ladder(options: argparse.Namespace, name: str, gpus: int, room: float) -> Iterator[tuple[str, Config, Models]]:
    """Texts that may be written, the most demanding first, none above the teacher's own size. Without GPUs the first always fits."""
    own: tuple[int, int] | None = None
    for side, batch, at_once in LADDER:
        if side is not None and own is not None and side >= max(own):
            continue
        text = "\n".join(_lines(options, name, gpus, room, side, batch, at_once)) + "\n"
        config = validated(Config, yaml.safe_load(text))
        models = models_of(config)
        own = own or models.image
        yield text, config, models


def _lines(
    options: argparse.Namespace, name: str, gpus: int, room: float, side: int | None, batch: int, at_once: int
) -> Iterator[str]:
    """The lines of a configuration file."""
    usual, ranks = USUAL[options.family], max(1, gpus)
    number = "bfloat16" if gpus else "float32"
    yield f"# yaml-language-server: $schema={SCHEMAS[Config]}"
    yield f"# Distils {options.family} with low-rank adapters. `flashdmd config KEY` explains a key; docs/configuration.md all of them."
    yield "steps: 2000          # the first few hundred show whether it works"
    yield f"batch: {batch * ranks}             # larger is steadier; accumulation below keeps it in memory"
    yield "ttur: 1"
    yield f"runtime: {'ray' if gpus > 1 else 'local'}       # local: one process. ray: one for each GPU here"
    yield f"run: {{name: {_text(name)}}}   # the same name again resumes the run"
    yield from _model(options, number, side)
    yield "data:"
    yield f"  source: {_text(options.images or DRAWN + '/images')}"
    if options.prompts:
        yield f"  prompts: {_text(options.prompts)}"
    yield "generator: {lr: 1.0e-5, warmup: 100}   # adapters take 10 to 20 times the rates of whole networks"
    coupling = "" if options.sam else ", ema: 1.0"
    yield f"score: {{lr: 1.0e-4, warmup: 100{coupling}}}       # ten times the generator's: it must follow it"
    yield f"matching: {{guidance_scale: {usual.guidance}}}        # the teacher's: more is more saturated and less diverse"
    if options.sam:
        yield "adversarial: {balance: 0.5}"
    else:
        yield f"# DMD2's discriminator: Flash-DMD's needs Segment Anything, which was not there. See {SAM_URL}"
        yield "adversarial: {space: latent, loss: non_saturating, weight: 5.0e-3, score_weight: 1.0e-2}"
    yield "preference:          # updates: 0 is distillation alone"
    yield "  start_step: 700    # distillation alone before"
    yield "  updates: 5"
    yield f"  batch: {4 * ranks}"
    yield "  candidates: 4"
    yield "  decode_batch: 4"
    yield "  lr: 2.0e-6"
    yield "rewards:             # held_out: a judge that training does not raise"
    half = "float16" if gpus else "float32"
    yield f"  - {{kind: pickscore, path: yuvalkirstain/PickScore_v1, dtype: {half}, batch: 4}}"
    yield f"  - {{kind: imagereward, path: THUDM/ImageReward, dtype: {half}, batch: 4, held_out: true}}"
    yield "monitor: {every: 10}"
    yield "lora: {networks: [generator, score], rank: 32}"
    yield "engine:"
    if ranks > 1:
        yield "  kind: deepspeed"
    yield f"  precision: {number}"
    yield "  gradient_checkpointing: true"
    yield f"  accumulation: {batch // at_once}    # parts of a batch, one after another, to save memory"
    yield from _placement(gpus, room)
    yield "checkpoint: {every: 250}"
    yield "tracking: {samples_every: 100}"
    yield f"evaluation: {{batch: 2, guidance_scale: {usual.guidance}, ema: 0.95}}"


def _model(options: argparse.Namespace, number: str, side: int | None) -> Iterator[str]:
    usual = USUAL[options.family]
    yield "model:"
    yield f"  family: {options.family}"
    yield f"  teacher: {_text(options.teacher or usual.teacher)}"
    if usual.vae and not options.teacher and number == "bfloat16":
        yield f"  vae: {usual.vae}   # the teacher's own overflows below float32"
    yield f"  dtype: {number}"
    if side is not None:
        yield f"  resolution: [{side}, {side}]   # null is the teacher's own size, which would not fit"
    if options.teacher_config:
        yield f"  teacher_config: {_text(options.teacher_config)}   # JSON files and tokenizers for that one file"
    if options.sam:
        yield f"  sam: {_text(options.sam)}   # from {SAM_URL}"


def _placement(gpus: int, room: float) -> Iterator[str]:
    """The section `placement`: all roles on each GPU."""
    if not gpus:
        yield "placement: {threads: 4}   # no GPUs: everything on the CPU"
        return
    yield "placement:           # all roles on each GPU; docs/planning.md has other layouts"
    yield f"  learner: {{workers: {gpus}, gpus: 1, gpu_memory_gib: {room:g}}}"
    for group in ("discriminator", "rollout", "reward"):
        yield f"  {group}: {{within: learner}}"
    yield "  threads: 4"


def _text(text: str) -> str:
    """Text as YAML reads it back: in quotes where it must be."""
    return json.dumps(text) if yaml.safe_load(f"a: {text}") != {"a": text} else text
