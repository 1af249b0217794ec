"""The training job in one process: resume to the bit, the model it leaves behind, a run that uses it, mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from flashdmd_ray.batch import StepRng
from flashdmd_ray.config import PRESETS, dump_config, load_as, parse_config, validated
from flashdmd_ray.losses.reward_model import pair_loss
from flashdmd_ray.models import family_class
from flashdmd_ray.models.latent_reward import load_latent_reward
from flashdmd_ray.reward_training.cli import train_latent_reward_command
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.job import run_reward_training
from flashdmd_ray.reward_training.pairs import open_pair_data
from flashdmd_ray.reward_training.training import (
    RewardTrainer,
    encode_pairs,
    noised,
    pair_rewards,
    spread_timesteps,
)
from flashdmd_ray.roles.networks import load_parts
from flashdmd_ray.run.metrics_log import read_metrics
from tests.metrics_page import undocumented, unwritten
from tests.reward_training.conftest import write_pairs

SHIPPED = [name for name in PRESETS if name.startswith("latent_reward")]


def result_of(config: RewardTrainingConfig) -> Path:
    return config.run.dir / config.run.name / "latent_reward"


def interrupt_at(config: RewardTrainingConfig, step: int) -> threading.Thread:
    """SIGTERM to this process once so many steps are recorded."""
    metrics = config.run.dir / config.run.name / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(r["step"] >= step for r in read_metrics(metrics)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_stopped_job_ends_with_the_same_model_and_a_finished_one_is_left_alone(configure, capsys) -> None:
    whole, cut = configure("whole", steps=40), configure("cut", steps=40)
    assert run_reward_training(whole) == 0
    watcher = interrupt_at(cut, 3)
    assert run_reward_training(cut) == 143
    watcher.join()
    assert not result_of(cut).exists()
    steps = [r["step"] for r in read_metrics(cut.run.dir / "cut" / "metrics.jsonl")]
    assert 3 <= steps[-1] < 40
    assert run_reward_training(cut) == 0
    ours, theirs = (load_file(result_of(c) / "model.safetensors") for c in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [read_metrics(c.run.dir / c.run.name / "metrics.jsonl") for c in (cut, whole)]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == list(range(1, 41))
    assert undocumented(records[0][0], reward_training=True) == unwritten(records[0][0], reward_training=True) == []
    capsys.readouterr()
    assert run_reward_training(whole) == 0
    assert "is finished" in capsys.readouterr().out


def test_it_learns_what_labels_say_and_a_run_loads_it(configure, tmp_path) -> None:
    """Labels that a look at the picture can tell (bright is better): the loss falls, and what was learnt holds on held-out prompts."""
    rows = [bright(number) for number in range(120)]
    source = write_pairs(tmp_path / "bright.parquet", rows)
    pairs = {"source": str(source), "held_out": 0.3, "cache": str(tmp_path / "cache")}
    config = configure("bright", steps=60, batch=16, pairs=pairs, timestep_range=[0, 500], ema=0)
    assert run_reward_training(config) == 0
    report = json.loads((result_of(config) / "accuracy.json").read_text())
    found = report["against"]["labels"]["latent"]["0"]["own"]
    assert found["accuracy"] > 0.8, found
    assert found["above_chance_99"]
    losses = [r["loss"] for r in read_metrics(config.run.dir / "bright" / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    card = (result_of(config) / "README.md").read_text()
    assert f"path: {result_of(config)}" in card
    assert "| latent | t = 999 |" in card
    model = load_latent_reward(result_of(config))
    assert model.transformer.config.num_layers == 2, "half of three blocks, rounded up"
    parse_config(
        {
            "model": {"family": "sd3", "teacher": str(config.model.teacher)},
            "rewards": [{"kind": "latent", "path": str(result_of(config))}],
        }
    )


def bright(number: int) -> dict[str, object]:
    generator, made = np.random.default_rng(number), {}
    winner = int(generator.integers(2))
    for which in (0, 1):
        pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8) + (140 if which == winner else 0)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
        made[f"jpg_{which}"] = file.getvalue()
    return {"caption": f"scene {number}", **made, "label_0": float(winner == 0), "label_1": float(winner == 1)}


def test_rewards_judge_given_pairs_and_what_the_teacher_draws(configure, tmp_path) -> None:
    rewards = [{"kind": "pickscore"}]
    given = configure("given", steps=2, rewards=rewards, pairs=configure().pairs.model_dump() | {"labels": "rewards"})
    assert run_reward_training(given) == 0
    against = json.loads((result_of(given) / "accuracy.json").read_text())["against"]
    assert against["labels"]["pixel"]["pickscore"]["accuracy"] == 1.0, "its own verdicts"
    assert against["truth"]["pixel"]["pickscore"]["accuracy"] < 0.9, "labels of the source that nobody can tell"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"picture {n}" for n in range(12)))
    drawn = {
        "source": "teacher",
        "labels": "rewards",
        "count": 24,
        "prompts": str(prompts),
        "drawing_steps": [1, 2],
        "held_out": 0.3,
    }
    config = configure(
        "drawn", steps=2, rewards=rewards, pairs=drawn | {"cache": str(tmp_path / "cache"), "max_bad_fraction": 0.1}
    )
    assert run_reward_training(config) == 0
    data = open_pair_data(config.pairs, str(config.run.dir / "drawn" / "pairs" / "all"), (16, 16), 0)
    assert len(data.train) + len(data.held_out) == 24


def test_one_update_is_that_of_plain_torch_and_micro_batches_change_nothing(configure) -> None:
    config = configure(ema=0)
    family = load_parts(config.model, ("vae", "text"))
    pairs = open_pair_data(config.pairs, config.pairs.source, family.image_size, 0).train.take(torch.arange(4))
    rows = torch.arange(4)

    def updated(**engine) -> tuple[float, torch.Tensor]:
        trainer = RewardTrainer.from_config(configure(engine=engine, ema=0), family)
        norm = trainer.step(0, pairs, rows)["gradient_norm"]
        return norm, torch.cat([weight.flatten() for weight in trainer.engine.weights().values()])

    model = RewardTrainer.from_config(config, family).engine.copy().requires_grad_(True)
    draw, clean = StepRng(config.seed, 0), encode_pairs(family, pairs.images)
    times = spread_timesteps(draw, 4, config.timestep_range)
    noisy = noised(family, clean, times, rows, draw.seed("noise"), "shared")
    pair_loss(pair_rewards(family, model, noisy, times, pairs.texts), pairs.labels).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr / 2, betas=(0.9, 0.999), weight_decay=0.01)
    norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip).item()
    optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for engine in ({}, {"accumulation": 3}, {"gradient_checkpointing": True}):
        found, weights = updated(**engine)
        assert found == pytest.approx(norm, rel=1e-4)
        # AdamW turns the rounding of a gradient near zero into a visible part of an update, so single elements may differ.
        assert (weights[: len(expected)] - expected).square().mean().sqrt() < 1e-4


def test_training_the_last_part_leaves_the_rest_as_the_teacher_has_it(configure, teacher) -> None:
    config = configure("last", steps=2, latent_reward={"train": "last"}, ema=0)
    assert run_reward_training(config) == 0
    model = load_latent_reward(result_of(config))
    network = family_class("sd3").from_pretrained(str(teacher), parts=["denoiser"]).teacher.network.state_dict()
    same = {
        n: torch.equal(p, network[n]) for n, p in model.transformer.named_parameters() if p.shape == network[n].shape
    }
    last = model.last_part.removeprefix("transformer.")
    assert all(equal for name, equal in same.items() if not name.startswith(last))
    assert not all(equal for name, equal in same.items() if name.startswith(last))


def test_timesteps_are_one_from_each_part_of_the_range() -> None:
    times = spread_timesteps(StepRng(0, 5), 50, (100, 299))
    assert [int(t - 100) // 4 for t in times] == list(range(50))
    assert spread_timesteps(StepRng(0, 5), 7, (42, 42)).tolist() == [42] * 7
    assert not torch.equal(times, spread_timesteps(StepRng(0, 6), 50, (100, 299)))


@pytest.mark.parametrize("preset", SHIPPED)
def test_presets_parse_and_dump_to_the_same(preset) -> None:
    config = load_as(RewardTrainingConfig, preset)
    assert validated(RewardTrainingConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stpes=3", "stpes: unknown key, did you mean 'steps'?"),
        ("pairs.sorce=x", "pairs.sorce: unknown key, did you mean 'source'?"),
        ("rewards=[{kind: latent}]", "rewards.0.kind: 'latent' does not look at images"),
        ("rewards=[{kind: pickscore, pool: x}]", "rewards.0.pool: there are no pools here"),
        ("rewards=[]", "needs one that is not held_out"),
        ("pairs={source: teacher}", "labels: nobody has judged what the teacher draws"),
        ("pairs={source: student, labels: rewards}", "run: goes with source 'student'"),
        ("pairs.prompts=x.txt", "prompts: only source 'teacher' and 'student' draw"),
        ("workers.workers=3", "workers.workers: 3 ranks cannot share batch 64 equally"),
        ("engine.accumulation=65", "engine.accumulation: 64 pairs on each rank"),
        ("latent_reward.blocks=3", "latent_reward.blocks: family 'sdxl' has no transformer blocks"),
        ("optimizer.decay=2000", "decay: the rate of this job falls by its schedule"),
        ("timestep_range=[9, 3]", "timestep_range: the first must not be above the second"),
        ("pairs.source=nowhere.parquet", "pairs.source: nowhere.parquet is no .parquet file"),
        ("rewards=[{kind: pickscore, path: nowhere}]", "rewards.0.path: no such directory: 'nowhere'"),
        ("pairs={source: teacher, labels: rewards, prompts: x.txt}", "pairs.prompts: no such file: x.txt"),
        ("pairs={source: student, labels: rewards, run: nowhere}", "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(override, says, capsys, tmp_path) -> None:
    assert train_latent_reward_command(["--dry-run", "--set", override, f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_parts_of_the_demo_are_refused_beside_another_teacher(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    other = ["--dry-run", "--set", f"run.dir={tmp_path}", "model.teacher=stabilityai/stable-diffusion-xl-base-1.0"]
    assert train_latent_reward_command(other) == 2
    keys = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert keys == ["rewards.0.path", "pairs.source"]
    drawn = [
        "pairs={source: teacher, labels: rewards}",
        "rewards=[{kind: pickscore, path: yuvalkirstain/PickScore_v1}]",
    ]
    assert train_latent_reward_command([*other, *drawn]) == 2
    assert capsys.readouterr().err.startswith(
        "error: pairs.prompts: null takes the captions of the demo's digit scenes"
    )


def test_dry_run_says_what_would_be_done_and_leaves_no_trace(capsys, tmp_path) -> None:
    assert train_latent_reward_command(["--dry-run", "--set", f"run.dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    for part in (
        "8,192 of digit scenes",
        "the verdicts of the pixel rewards",
        "400 updates of 64 pairs",
        "1 under Ray Train",
        "kind: latent, path:",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_every_field_has_a_docstring() -> None:
    plain = {"batch", "seed", "betas", "weight_decay", "warmup"}
    for name, section in RewardTrainingConfig.model_fields.items():
        for field, info in (getattr(section.annotation, "model_fields", None) or {}).items():
            assert info.description or field in plain, f"{name}.{field} has no docstring"


def test_another_configuration_under_the_same_name_is_refused(configure) -> None:
    assert run_reward_training(configure("same", steps=1)) == 0
    with pytest.raises(ValueError, match=r"steps was 1 and is now 2"):
        run_reward_training(configure("same", steps=2))


def test_rows_that_rewards_cannot_judge_stop_the_job(configure, monkeypatch) -> None:
    from flashdmd_ray.reward_training import prepare

    def broken(judges, images, texts):
        return {"pickscore": torch.full((len(texts), 2), float("inf"))}

    monkeypatch.setattr(prepare, "judge", broken)
    pairs = configure().pairs.model_dump() | {"labels": "rewards"}
    with pytest.raises(ValueError, match=r"pairs got a reward that is not finite .*raise pairs\.max_bad_fraction"):
        run_reward_training(configure("broken", rewards=[{"kind": "pickscore"}], pairs=pairs))
