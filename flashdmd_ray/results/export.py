"""The distilled model as a plain diffusers directory that generates the very images of our own sampler, or as a single file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.diffusion.schedule import FlowSchedule, schedule_from_config
from flashdmd_ray.engine.deepspeed_engine import import_deepspeed
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.original_layout import original_weights
from flashdmd_ray.results.export_facts import FACTS, SINGLE_FILE
from flashdmd_ray.results.model_card import CardFacts, model_card
from flashdmd_ray.roles.networks import load_student
from flashdmd_ray.run.files import new_folder

FORMAT = 2
VARIANTS: Mapping[torch.dtype | None, str] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""diffusers' name of the files of a type."""

# LCMScheduler blends its output with its input, x = c_out x0 + c_skip x_t with c_skip = 0.25 / ((scaling t)^2 +
# 0.25). At its default scaling of 10 that is 4e-8 at t = 249; at this one c_skip x_t vanishes in float32 and c_out is
# exactly 1.
_TIMESTEP_SCALING = 1e6


def few_step_scheduler(
    scheduler_config: Mapping[str, Any], timesteps: Sequence[int]
) -> tuple[SchedulerMixin, dict[str, Any]]:
    """A stock scheduler with our steps x_next = a_next x0 + s_next e, and the pipeline's arguments that take exactly `timesteps`.

    The arguments: num_inference_steps where that is enough, else timesteps, or sigmas of a flow.

    Raises ValueError for a schedule that is not supported.
    """
    schedule = schedule_from_config(scheduler_config)
    if isinstance(schedule, FlowSchedule):
        total = schedule.num_timesteps
        scheduler = FlowMatchEulerDiscreteScheduler(total, shift=schedule.shift, stochastic_sampling=True)
        # Noise levels before the shift, which the scheduler applies. Its own spacing ends at sigma_min, ours does not.
        return scheduler, {"sigmas": [(timestep + 1) / total for timestep in timesteps]}
    return _lcm_scheduler(scheduler_config, timesteps)


def _lcm_scheduler(
    scheduler_config: Mapping[str, Any], timesteps: Sequence[int]
) -> tuple[SchedulerMixin, dict[str, Any]]:
    # As training reads it: what the configuration does not state has DDPM's defaults, not LCM's.
    config = DDPMScheduler.from_config(dict(scheduler_config)).config
    taken = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    settings = {name: config[name] for name in taken}
    settings |= {
        "rescale_betas_zero_snr": config["rescale_betas_zero_snr"],
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "timestep_scaling": _TIMESTEP_SCALING,
    }
    total = int(settings["num_train_timesteps"])
    for resolution in (total, len(timesteps)):
        scheduler = LCMScheduler(**settings, original_inference_steps=resolution)
        scheduler.set_timesteps(len(timesteps))
        if scheduler.timesteps.tolist() == list(timesteps):
            return scheduler, {"num_inference_steps": len(timesteps)}
    return LCMScheduler(**settings, original_inference_steps=total), {"timesteps": list(timesteps)}


def export_pipeline(
    family: Family,
    weights: Mapping[str, Tensor],
    timesteps: Sequence[int],
    out: Path,
    facts: CardFacts,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write pipeline, scheduler, `flashdmd.json` and model card to `out`, in one rename; returns `out`.

    dtype: of the weights, as they are by default; those of half precision become diffusers' variant fp16 or bf16, and the family's parts
    take it too. An earlier export there is replaced. `family` needs all its parts. Raises ValueError when `out` holds something else, the
    weights do not fit the network, or a value does not fit dtype.
    """
    student = load_student(family, weights)
    variant = VARIANTS.get(dtype)
    name, settings = family.pipeline_class.__name__, family.load_settings() | ({"variant": variant} if variant else {})
    loading = f"""from diffusers import {name}

pipeline = {name}.from_pretrained({loading_arguments("path/to/this/directory", settings, dtype)})"""
    with export_folder(family, timesteps, out, facts, loading, "finetune", settings) as (folder, scheduler):
        import_deepspeed(family.device)  # before accelerate does so aloud, to ask whether a part is a DeepSpeed engine
        pipeline = cast_pipeline(family.pipeline(student, scheduler), dtype)
        pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
    return out


def export_single_file(
    family: Family,
    weights: Mapping[str, Tensor],
    timesteps: Sequence[int],
    out: Path,
    facts: CardFacts,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the whole student as one file of the original layout, for ComfyUI and A1111, with what `export_pipeline` writes beside it.

    Arguments and errors are those of `export_pipeline`.
    """
    student = load_student(family, weights)
    loading = scheduled_loading(
        family,
        timesteps,
        f"""pipeline = {family.pipeline_class.__name__}.from_single_file(
    "path/to/this/directory/{SINGLE_FILE}", config="{teacher_of(facts.base)}"{_dtype_argument(dtype)}
)""",
    )
    with export_folder(family, timesteps, out, facts, loading, "finetune") as (folder, scheduler):
        pipeline = cast_pipeline(family.pipeline(student, scheduler), dtype)
        save_file(_unshared(original_weights(pipeline, FAMILIES[family.name])), folder / SINGLE_FILE, {"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
    return out


def cast_pipeline(pipeline: DiffusionPipeline, dtype: torch.dtype | None) -> DiffusionPipeline:
    """Cast all modules of a pipeline in place; returns it. Raises ValueError for a value that is too large for dtype."""
    if dtype is None:
        return pipeline
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            refuse_overflow(module.state_dict(), dtype, f"{part}: ")
            module.to(dtype)
    return pipeline


def _unshared(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that have no memory in common, such as T5's embedding, which has two names."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in weights:
        tensors[name] = tensor.clone() if tensor.data_ptr() in taken else tensor.contiguous()
        taken.add(tensor.data_ptr())
    return tensors


def refuse_overflow(weights: Mapping[str, Tensor], dtype: torch.dtype, where: str = "") -> None:
    """Check that dtype can hold all values. Raises ValueError for one that is too large."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.abs().max() > torch.finfo(dtype).max:
            raise ValueError(
                f"--dtype {str(dtype)[6:]}: {where}{name} has values that are too large for it; use bfloat16"
            )


def check_target(out: Path, form: str = "pipeline", family: str = "") -> None:
    """Raises ValueError when `out` holds something else than an earlier export, or the family has no such form."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / FACTS).is_file())):
        raise ValueError(
            f"{out} exists and is no earlier export (it has no {FACTS}): choose another directory or remove it"
        )
    if form == "kohya" and FAMILIES[family].denoiser != "unet":
        raise ValueError(
            f"--format kohya: kohya's names are those of U-Nets, and a model of family '{family}' has none; use --format lora"
        )


@contextmanager
def export_folder(
    family: Family,
    timesteps: Sequence[int],
    out: Path,
    facts: CardFacts,
    loading: str,
    relation: str,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Path, SchedulerMixin]]:
    """Yield the folder that becomes `out` when the block ends without an error, and the few-step scheduler of these timesteps.

    The block saves weights and scheduler there; `flashdmd.json` and a model card are added. loading: the lines of Python of the card's
    example that make `pipeline`. relation: the hub's word for what this is to its base. settings: arguments of from_pretrained, the
    family's by default. An earlier export at `out` is replaced in one rename. Raises ValueError when something else is there.
    """
    check_target(out)
    scheduler, steps = few_step_scheduler(family.scheduler_config, timesteps)
    with new_folder(out) as folder:
        yield folder, scheduler
        _forget_source_paths(folder)
        sampler = _sampler_facts(family, timesteps, steps, facts, settings or family.load_settings())
        (folder / FACTS).write_text(json.dumps(sampler, indent=1) + "\n", encoding="utf-8")
        ModelCard(model_card(sampler, facts, loading, relation)).save(folder / "README.md")


def _sampler_facts(
    family: Family, timesteps: Sequence[int], steps: Mapping[str, Any], facts: CardFacts, load: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of flashdmd.json. load, call: keyword arguments of the pipeline's from_pretrained and of its call.

    original_size and crops_coords_top_left must be given as tuples, which JSON does not have.

    seed: where a seed goes: "generator", the call's argument, or "torch", `torch.manual_seed`, since
    StableDiffusion3Pipeline does not hand its generator to the scheduler.
    """
    return {
        "format": FORMAT,
        "base": facts.base,
        "prediction_type": family.schedule.prediction_type,
        "timesteps": list(timesteps),
        "pipeline": family.pipeline_class.__name__,
        "load": load,
        "call": {**steps, "guidance_scale": 0, **family.call_settings()},
        "seed": "torch" if "sigmas" in steps else "generator",
        "examples": [{"prompt": prompt, "seed": seed} for prompt, seed in facts.examples],
    }


def _forget_source_paths(directory: Path) -> None:
    """Remove from saved configurations where they were loaded from: a path of this machine."""
    for file in directory.rglob("*.json"):
        if file.name not in ("config.json", "model_index.json", "scheduler_config.json"):
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def loading_arguments(path: str, settings: Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """Arguments of a pipeline's from_pretrained, as Python. settings: `Family.load_settings`."""
    named = {**settings, "use_safetensors": True}
    return ", ".join([json.dumps(path), *(f"{name}={value!r}" for name, value in named.items())]) + _dtype_argument(
        dtype
    )


def scheduled_loading(family: Family, timesteps: Sequence[int], lines: str) -> str:
    """Python that makes `pipeline` by `lines` and gives it the few-step scheduler beside this export."""
    scheduler = type(few_step_scheduler(family.scheduler_config, timesteps)[0]).__name__
    return f"""from diffusers import {scheduler}, {family.pipeline_class.__name__}

{lines}
pipeline.scheduler = {scheduler}.from_pretrained("path/to/this/directory", subfolder="scheduler")"""


def teacher_of(base: str) -> str:
    """The teacher's hub id, or what stands for its folder in an example."""
    return base if base.count("/") == 1 else "path/to/the/base"


def _dtype_argument(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f", torch_dtype={dtype}"
