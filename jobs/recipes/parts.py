"""Order, files and record of the parts: each one can be made alone when the parts it needs are there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.demo.checker import PromptChecker
from recipes import checker, latent_clip, latent_reward, reward, sam, teacher, teacher_sd3, text, vae
from recipes.training import Plan

RECORD = "measurements.json"
Metrics = dict[str, float]


def make_checker(out: Path, work: Path, plan: Plan) -> Metrics:
    judge, metrics = checker.train(work, plan)
    checker.save(judge, out / "checker")
    return metrics


def make_vae(out: Path, work: Path, plan: Plan) -> Metrics:
    model, metrics = vae.train(work, plan)
    model.half().save_pretrained(out / "teacher" / "vae")
    return metrics


def make_text(out: Path, work: Path, plan: Plan) -> Metrics:
    tokenizer, one, two, metrics = text.train(work, plan)
    for folder in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(out / "teacher" / folder)
    for folder, tower in (("text_encoder", one), ("text_encoder_2", two)):
        tower.half().save_pretrained(out / "teacher" / folder)
        text.declare_float32(out / "teacher" / folder / "config.json")
    return metrics


def make_teacher(out: Path, work: Path, plan: Plan) -> Metrics:
    home = out / "teacher"
    decoder = AutoencoderKL.from_pretrained(_need(home / "vae")).eval()
    tokenizer = _tokenizer(out)
    one = CLIPTextModel.from_pretrained(_need(home / "text_encoder")).eval()
    two = CLIPTextModelWithProjection.from_pretrained(_need(home / "text_encoder_2")).eval()
    unet, metrics = teacher.train(work, decoder, tokenizer, one, two, plan)
    teacher.save(teacher.build_pipeline(decoder, tokenizer, one, two, unet), home)
    judge = PromptChecker.load(_need(out / "checker"))
    return metrics | teacher.report(StableDiffusionXLPipeline.from_pretrained(home), judge)


def make_teacher_sd3(out: Path, work: Path, plan: Plan) -> Metrics:
    home = out / "teacher"
    decoder = AutoencoderKL.from_pretrained(_need(home / "vae")).eval()
    tokenizer = _tokenizer(out)
    tower = CLIPTextModel.from_pretrained(_need(home / "text_encoder")).eval()
    two = CLIPTextModelWithProjection.from_pretrained(_need(home / "text_encoder_2")).eval()
    one = teacher_sd3.with_projection(tower, tokenizer, plan.seed)
    transformer, metrics = teacher_sd3.train(work, decoder, tokenizer, one, two, plan)
    teacher.save(teacher_sd3.build_pipeline(decoder, tokenizer, one, two, transformer), out / "teacher_sd3")
    judge = PromptChecker.load(_need(out / "checker"))
    return metrics | teacher_sd3.report(teacher_sd3.load(out / "teacher_sd3"), judge)


def make_reward(out: Path, work: Path, plan: Plan) -> Metrics:
    tokenizer = _tokenizer(out)
    model, metrics = reward.train(work, tokenizer, plan)
    reward.save(model, tokenizer, out / "reward")
    return metrics


def make_latent_reward(out: Path, work: Path, plan: Plan) -> Metrics:
    model, metrics = latent_reward.train(work, _need(out / "teacher", "model_index.json"), plan)
    latent_reward.save(model, out / "latent_reward", out / "teacher")
    return metrics


def make_latent_clip(out: Path, work: Path, plan: Plan) -> Metrics:
    teacher, judge = _need(out / "teacher", "model_index.json"), _need(out / "reward")
    model, metrics = latent_clip.train(work, teacher, judge, plan)
    latent_clip.save(model, out / "latent_clip")
    return metrics


def make_sam(out: Path, work: Path, plan: Plan) -> Metrics:
    model, metrics = sam.train(work, plan)
    sam.save(model, out / "sam")
    return metrics


# In an order in which every part finds what it needs.
PARTS: dict[str, tuple[Callable[[Path, Path, Plan], Metrics], Plan]] = {
    "checker": (make_checker, checker.PLAN),
    "vae": (make_vae, vae.PLAN),
    "text": (make_text, text.PLAN),
    "teacher": (make_teacher, teacher.PLAN),
    "teacher_sd3": (make_teacher_sd3, teacher_sd3.PLAN),
    "reward": (make_reward, reward.PLAN),
    "latent_reward": (make_latent_reward, latent_reward.PLAN),
    "latent_clip": (make_latent_clip, latent_clip.PLAN),
    "sam": (make_sam, sam.PLAN),
}


def make(part: str, out: Path, work: Path, steps_scale: float) -> Metrics:
    """Train one part into `out`, resuming from `work`, and write its record and the card. Returns its figures.

    Raises ValueError when a part that it needs is not there.
    """
    maker, plan = PARTS[part]
    plan = replace(plan, steps=max(1, round(plan.steps * steps_scale)), warmup=round(plan.warmup * steps_scale))
    out.mkdir(parents=True, exist_ok=True)
    metrics = maker(out, work, plan)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files for their owner only
    _record(part, out, plan, metrics)
    return metrics


def _record(part: str, out: Path, plan: Plan, metrics: Metrics) -> None:
    file = out / RECORD
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    record[part] = {
        "command": f"python jobs/prepare_demo.py --part {part}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": plan.seed,
        "steps": plan.steps,
        "learning_rate": plan.learning_rate,
        "metrics": metrics,
    }
    file.write_text(json.dumps({name: record[name] for name in PARTS if name in record}, indent=2) + "\n")
    (out / "CARD.md").write_text(card(record, out))


def card(record: dict[str, Any], out: Path) -> str:
    """The card beside the weights, made of records only."""
    lines = [
        "# Weights of the digit-scenes demo world",
        "",
        "Generated by `jobs/prepare_demo.py` from what it measured; `docs/demo_world.md` explains the parts.",
        (
            "Data: scikit-learn's `load_digits` (1,797 handwritten digits, UCI, CC BY 4.0), composed by"
            " `flashdmd_ray/demo/scenes.py`. Training sees train-split digits and captions only; every figure is on the"
            " held-out split. Files hold half precision."
        ),
        "",
    ]
    for part in PARTS:
        if part not in record:
            continue
        entry = record[part]
        lines += [
            f"## {part}",
            (
                f"`{entry['command']}`, {entry['date']}, torch {entry['torch']}, {entry['threads']} CPU thread(s), seed"
                f" {entry['seed']}, {entry['steps']} steps, learning rate {entry['learning_rate']:g}"
            ),
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in entry["metrics"].items()),
            "",
        ]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return "\n".join([*lines, f"All files together: {size / 1e6:.1f} MB.", ""])


def _tokenizer(out: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_need(out / "teacher" / "tokenizer", "tokenizer.json"))


def _need(path: Path, file: str = "config.json") -> Path:
    if not (path / file).is_file():
        raise ValueError(f"{path / file} is missing: make the parts in their order ({', '.join(PARTS)})")
    return path
