"""The distilled model as a plain diffusers directory that draws the very images of our own sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from flashdmd_ray.diffusion.schedule import FlowSchedule, schedule_from_config
from flashdmd_ray.engine.deepspeed_engine import import_deepspeed
from flashdmd_ray.models.family import Family
from flashdmd_ray.results.export_facts import FACTS
from flashdmd_ray.roles.networks import load_student
from flashdmd_ray.run.files import new_folder

FORMAT = 2

# LCMScheduler blends its output with its input, x = c_out x0 + c_skip x_t with c_skip = 0.25 / ((scaling t)^2 +
# 0.25). At its default scaling of 10 that is 4e-8 at t = 249; at this one c_skip x_t vanishes in float32 and c_out is
# exactly 1.
_TIMESTEP_SCALING = 1e6


@dataclass(frozen=True)
class CardFacts:
    """What the model card says beyond the sampler."""

    name: str
    """Title of the card."""
    base: str
    """The teacher: a hub id, or a name."""
    licence: str
    """Licence tag of the hub, e.g. apache-2.0, openrail++ or other."""
    cost: Mapping[str, str | int | float]
    """What training took, e.g. {"generator updates": 200, "batch": 32}."""
    optimised_rewards: Sequence[str]
    """Rewards that preference learning optimised: no evidence of quality on their own."""
    hack_monitor: str | None = None
    """The hack monitor's message about the training; None where it was off."""
    measured: Mapping[str, Any] | None = None
    """The evaluation table (`evaluation.as_json`), of which rows named "student, ..." are this model's; None or no rows: not measured."""
    examples: Sequence[tuple[str, int]] = ()
    """(prompt, seed) of pictures that can be drawn again."""


def few_step_scheduler(
    scheduler_config: Mapping[str, Any], timesteps: Sequence[int]
) -> tuple[SchedulerMixin, dict[str, Any]]:
    """A stock scheduler whose steps are our hops x_next = a_next x0 + s_next e, and the arguments with which a pipeline
    takes exactly `timesteps`: num_inference_steps where that is enough, else timesteps, or sigmas of a flow.

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
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    settings = {name: config[name] for name in kept}
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
    family: Family, weights: Mapping[str, Tensor], timesteps: Sequence[int], out: Path, facts: CardFacts
) -> Path:
    """Write pipeline, scheduler, `flashdmd.json` and model card to `out`, in one rename; returns `out`.

    An earlier export there is replaced. `family` needs all its parts. Raises ValueError when `out` holds something
    else or the weights do not fit.
    """
    student = load_student(family, weights)

    def save(directory: Path, scheduler: SchedulerMixin) -> None:
        import_deepspeed(family.device)  # before accelerate does so aloud, to ask whether a part is a DeepSpeed engine
        family.pipeline(student, scheduler).save_pretrained(directory, safe_serialization=True)

    name = family.pipeline_class.__name__
    loading = f"""from diffusers import {name}

pipeline = {name}.from_pretrained({loading_arguments("path/to/this/directory", family.load_settings())})"""
    return write_export(family, timesteps, out, facts, save, loading, relation="finetune")


def write_export(
    family: Family,
    timesteps: Sequence[int],
    out: Path,
    facts: CardFacts,
    save: Callable[[Path, SchedulerMixin], None],
    loading: str,
    relation: str,
) -> Path:
    """What every kind of export has: what `save(directory, few-step scheduler)` writes, `flashdmd.json` and a model card.

    loading: the lines of Python of the card's example that make `pipeline`. relation: the hub's word for what this is to
    its base. Replaces an earlier export at `out` in one rename; raises ValueError when something else is there.
    """
    scheduler, steps = few_step_scheduler(family.scheduler_config, timesteps)

    def write(directory: Path) -> None:
        save(directory, scheduler)
        _forget_source_paths(directory)
        sampler = _sampler_facts(family, timesteps, steps, facts)
        (directory / FACTS).write_text(json.dumps(sampler, indent=1) + "\n", encoding="utf-8")
        ModelCard(_card(sampler, facts, loading, relation)).save(directory / "README.md")

    return _replace_directory(out, write)


def _sampler_facts(
    family: Family, timesteps: Sequence[int], steps: Mapping[str, Any], facts: CardFacts
) -> dict[str, Any]:
    """What flashdmd.json says. load, call: keyword arguments of the pipeline's from_pretrained and of its call.

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
        "load": family.load_settings(),
        "call": {**steps, "guidance_scale": 0, **family.call_settings()},
        "seed": "torch" if "sigmas" in steps else "generator",
        "examples": [{"prompt": prompt, "seed": seed} for prompt, seed in facts.examples],
    }


def _forget_source_paths(directory: Path) -> None:
    """Saved configurations remember where they were loaded from: a path of this machine, which is nobody's business."""
    for file in directory.rglob("*.json"):
        if file.name not in ("config.json", "model_index.json", "scheduler_config.json"):
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_directory(out: Path, write: Callable[[Path], None]) -> Path:
    """Fill a new directory beside `out`, then put it in its place. A failure leaves `out` as it was."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / FACTS).is_file())):
        raise ValueError(
            f"{out} exists and is no earlier export (it has no {FACTS}): choose another directory or remove it"
        )
    with new_folder(out) as unfinished:
        write(unfinished)
    return out


def _card(sampler: Mapping[str, Any], facts: CardFacts, loading: str, relation: str) -> str:
    table: Mapping[str, Any] = facts.measured or {"rows": []}
    own = [row for row in table["rows"] if str(row["name"]).startswith("student,")]
    data = ModelCardData(
        license=facts.licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=facts.base if facts.base.count("/") == 1 else None,
        base_model_relation=relation if facts.base.count("/") == 1 else None,
        tags=["text-to-image", "diffusion", "few-step", "distillation", "flash-dmd"],
        model_name=facts.name,
        eval_results=[result for row in own for result in _results(row, table["prompts"])] or None,
    )
    sections = [
        f"# {facts.name}",
        (
            f"A {len(sampler['timesteps'])}-step text-to-image generator, distilled from {facts.base} with Flash-DMD"
            " (arXiv 2511.20549). It needs no guidance."
        ),
        "## Use\n\n" + _example(sampler, loading),
        (
            f"Denoising timesteps: {', '.join(map(str, sampler['timesteps']))}; every hop renoises with fresh noise. Values other"
            " than 0 or 1 for `guidance_scale` are not what the model was trained for. `flashdmd.json` states all this for programs."
        ),
        _examples(sampler),
        "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.cost.items()),
        _rewards(facts.optimised_rewards, facts.hack_monitor),
        _measurements(table) if table["rows"] else "",
        (
            f"## Licence\n\n`{facts.licence}`. The weights derive from {facts.base}; its terms go on to apply. No prompt or image"
            " filter is included."
        ),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _example(sampler: Mapping[str, Any], loading: str) -> str:
    prompt = sampler["examples"][0]["prompt"] if sampler["examples"] else "a photograph of a lighthouse"
    seed, generator = ("", "generator=torch.Generator().manual_seed(0)")
    if sampler["seed"] == "torch":
        seed, generator = ("torch.manual_seed(0)  # the scheduler's noise is not drawn from `generator`\n", "")
    lines = [repr(prompt), *(f"{name}={value!r}" for name, value in sampler["call"].items()), generator]
    arguments = "\n".join(f"    {line}," for line in lines if line)
    return f"""```python
import torch
{loading}
{seed}image = pipeline(
{arguments}
).images[0]
image.save("image.png")
```"""


def loading_arguments(path: str, settings: Mapping[str, Any]) -> str:
    """Of a pipeline's from_pretrained, as Python. settings: `Family.load_settings`."""
    named = {**settings, "use_safetensors": True}
    return ", ".join([json.dumps(path), *(f"{name}={value!r}" for name, value in named.items())])


def _examples(sampler: Mapping[str, Any]) -> str:
    if not sampler["examples"]:
        return ""
    seeding = "one generator per prompt" if sampler["seed"] == "generator" else "one prompt at a time, on the CPU"
    rows = [f"| {example['prompt']} | {example['seed']} |" for example in sampler["examples"]]
    head = [f"The pictures of the training run's grid, {seeding}:\n", "| prompt | seed |", "|---|---|"]
    return "\n".join(head + rows)


def _rewards(rewards: Sequence[str], hack_monitor: str | None) -> str:
    if not rewards:
        return "No reward model was optimised."
    verdict = "" if hack_monitor is None else f" The hack monitor's verdict on the training: {hack_monitor}."
    return (
        f"Preference learning optimised: {', '.join(rewards)}. **Scores of these models say how far they were optimised, not how"
        f" good the images are**; judge by the other columns.{verdict}"
    )


def _measurements(table: Mapping[str, Any]) -> str:
    figures = [_figures(row) for row in table["rows"]]
    names = ["name", "nfe", *figures[0]]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row, found in zip(table["rows"], figures, strict=True):
        values = [row["name"], str(row["nfe"]), *(f"{value:.4g}" for value in found.values())]
        lines.append("| " + " | ".join(values) + " |")
    explained = {
        "frechet": f"squared Frechet distance to real images between {table['space']}, comparable only within this table",
        "accuracy": "share of images that show what the prompt says",
        "diversity": "mean distance between samples of one prompt",
    }
    notes = [f"`{name}`: {text}." for name, text in explained.items() if name in names]
    first = f"{table['rows'][0]['samples']} {table['prompts']}. `nfe`: network forwards per sample."
    return "\n".join(["## Measured\n", " ".join([first, *notes]), "", *lines])


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a sampler, by name."""
    figures = {name: row[name] for name in ("frechet", "accuracy") if name in row}
    figures |= {f"reward {label}": value for label, value in row["rewards"].items()}
    return figures | ({"diversity": row["diversity"]} if "diversity" in row else {})


def _results(row: Mapping[str, Any], prompts: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{row['samples']} {prompts}, {row['nfe']} forwards each",
            metric_type=metric,
            metric_value=value,
            metric_name=metric,
        )
        for metric, value in _figures(row).items()
    ]
