"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData


@dataclass(frozen=True)
class CardFacts:
    """Facts of the model card beyond the sampler."""

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


def model_card(sampler: Mapping[str, Any], facts: CardFacts, loading: str, relation: str) -> str:
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
            f" In ComfyUI and A1111: sampler `lcm`, scheduler `sgm_uniform`, {len(sampler['timesteps'])} steps, cfg 1."
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
    for row, measured in zip(table["rows"], figures, strict=True):
        values = [row["name"], str(row["nfe"]), *(f"{value:.4g}" for value in measured.values())]
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
    """Measured values of a sampler, by name."""
    figures = {name: row[name] for name in ("frechet", "accuracy") if name in row}
    figures |= {f"reward {label}": value for label, value in row["rewards"].items()}
    return figures | ({"diversity": row["diversity"]} if "diversity" in row else {})


def _results(row: Mapping[str, Any], prompts: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{row['samples']} {prompts}",
            dataset_config=row["name"],  # by which the hub tells results of one data set apart
            metric_type=metric,
            metric_value=value,
            metric_name=metric,
        )
        for metric, value in _figures(row).items()
    ]
