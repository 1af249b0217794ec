"""What a checkpoint holds is all that a run needs: resumed from it alone, on a machine that knows nothing else, it goes on bit for bit."""

import random
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdmd_ray.checkpoint import (
    Destination,
    latest_checkpoint,
    load_tensors,
    manifests,
    read_state,
    select_checkpoint,
)
from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.checkpoint.selection import Best
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.run.storage import RemotePath, checkpoint_root
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.runtime import build_runtime
from flashdmd_ray.training import job
from flashdmd_ray.training.training_run import TrainingRun
from tests.checkpoint.troubled_store import TroubledFileSystem
from tests.checkpoint.writing import PART, write
from tests.tiny import save_sdxl

GAP = "matching/real_fake_gap"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("teacher"))


def small(teacher: Path, folder: Path, where: str | None, steps: int, batch: int = 2) -> Config:
    return parse_config(
        {
            "steps": steps,
            "batch": batch,
            "runtime": "local",
            "model": {"teacher": str(teacher)},
            "rewards": [{"kind": "pickscore"}],
            "run": {"dir": str(folder), "name": "small"},
            "adversarial": {"balance": 0.3},
            "preference": {"updates": 1, "batch": 2, "start_step": 1, "threshold": 0.0},
            "checkpoint": {"every": 1, "keep": 1, "best_metric": GAP, "dir": where},
            "tracking": {"enabled": False, "samples_every": 50},
            "evaluation": {"teacher_steps": 1},
        }
    )


def advance(config: Config) -> list[tuple[int, str]]:
    """Train to the configuration's last step as `run_job` does, without the report; returns the versions published on the way."""
    directory = RunDirectory.prepare(config.run, config)
    directory.reopen(config)
    runtime, published = build_runtime(config), []
    publish = runtime.publish

    def recorded(version):
        published.append((version, checksum(runtime.generator.weights())))
        return publish(version)

    runtime.publish = recorded
    with (
        Tracker(directory, config.tracking, after_step=0) as tracker,
        Progress(config.steps, 0) as progress,
        Interruption(progress.notice) as stop,
    ):
        run = TrainingRun(config, directory, runtime, tracker, progress, stop, {})
        run.restore()
        with run.checkpoints.saver:
            train(config, runtime, build_images(config.data, config.seed), run)
    return published


def everything(checkpoint):
    return {
        f"{file}:{name}": tensor
        for file in ("generator", "score_estimator", "discriminator", "reference")
        for name, tensor in load_tensors(checkpoint / f"{file}.safetensors").items()
    }


def test_resumed_from_the_store_alone_equals_never_stopped(tmp_path, teacher, caplog):
    """Two steps into a store that is away at the first; the machine is lost with its run folder; another one, whose global random states
    differ, does the third."""
    straight = small(teacher, tmp_path / "straight", None, steps=3)
    expected_versions = advance(straight)
    where = f"troubled://{uuid.uuid4().hex}"
    TroubledFileSystem.gate.set()
    TroubledFileSystem.reset(fail_at=8)
    versions = advance(small(teacher, tmp_path / "first", where, steps=2))
    assert "the checkpoint of step 1 could not be written" in caplog.text
    shutil.rmtree(tmp_path / "first")
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 (the global state is the point)
    second = small(teacher, tmp_path / "second", where, steps=3)
    versions += advance(second)

    root = checkpoint_root(second, tmp_path)
    one, two = latest_checkpoint(checkpoint_root(straight, tmp_path / "straight" / "small")), latest_checkpoint(root)
    expected, found = everything(one), everything(two)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert read_state(one)["counters"] == read_state(two)["counters"]
    assert versions == expected_versions, "the same weights were published under the same versions"
    assert [version for version, _ in versions] == [1, 2]

    gaps = {r["step"]: r[GAP] for r in read_metrics(tmp_path / "straight" / "small" / "metrics.jsonl")}
    best = select_checkpoint(checkpoint_root(straight, one.parent.parent), "best", Best(GAP, "min"))
    assert read_state(best)["step"] == min(gaps, key=gaps.get)
    assert {m.step: m.metrics[GAP] for m in manifests(one.parent)} == {
        step: gaps[step] for step in {3, min(gaps, key=gaps.get)}
    }

    with pytest.raises(
        ValueError, match=r"was written with another configuration \(batch was 2 and is now 4\)"
    ) as refusal:
        advance(small(teacher, tmp_path / "third", where, steps=4, batch=4))
    assert "\n" not in str(refusal.value)


def test_a_finished_distillation_can_be_given_a_second_stage(tmp_path, teacher):
    """Preference updates that are asked for later equal those that were planned, and may not be asked for in the past."""

    def staged(name: str, steps: int, **preference) -> Config:
        config = small(teacher, tmp_path / name, None, steps)
        return config.model_copy(update={"preference": config.preference.model_copy(update=preference)})

    advance(staged("planned", 2))
    for name in ("later", "past"):
        advance(staged(name, 1, updates=0, start_step=0))
    with pytest.raises(ValueError, match=r"has made 1 steps without preference updates.* set it to 1 or later"):
        advance(staged("past", 2, start_step=0))
    advance(staged("later", 2))
    planned, later = (latest_checkpoint(tmp_path / name / "small" / "checkpoints") for name in ("planned", "later"))
    expected, found = everything(planned), everything(later)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with pytest.raises(ValueError, match=r"preference\.updates was 1 and is now 2"):
        advance(staged("later", 3, updates=2))


def test_a_damaged_checkpoint_is_refused_before_anything_starts(tmp_path, teacher):
    config = small(teacher, tmp_path, None, steps=30)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"on_damage": "refuse"})})
    run = RunDirectory.prepare(config.run, config)
    older, newest = write(run.checkpoints, 10), write(run.checkpoints, 20)
    (newest / PART).write_bytes(b"x" + (newest / PART).read_bytes()[1:])
    with pytest.raises(
        ValueError, match=rf"{PART} is not what was written .* delete or move .* to go back to {older.name}"
    ):
        job.run_job(config)


def nudge(role, objective: str) -> None:
    """An update that moves every trained weight and every moment of an objective in place."""
    loss = sum(p.float().square().sum() for p in role.engine.module.parameters() if p.requires_grad)
    role.engine.backward(loss)
    role.engine.update(objective)


def test_roles_hand_over_values_that_training_does_not_touch(tmp_path, teacher):
    """Weights, moments, average and reference are saved as they were when `save` returned, whatever happens before they are written."""
    settings = {"model": {"teacher": str(teacher)}, "evaluation": {"ema": 0.9}, "generator": {"warmup": 0}}
    config = parse_config(settings)
    generator, score = Generator.from_config(config), ScoreEstimator.from_config(config)
    roles = (generator, score)
    generator.freeze_reference()

    def train_on() -> None:
        for role in roles:
            nudge(role, "distillation")
        nudge(generator, "preference")
        generator.update_ema()
        score.ema_update_from(generator, 0.5)

    train_on()
    now, later = tmp_path / "now", RemotePath(f"troubled://{uuid.uuid4().hex}")
    now.mkdir()
    TroubledFileSystem.reset()
    TroubledFileSystem.gate.clear()
    for role in roles:
        role.save(now)
        role.save(Destination(later, background=True))
    train_on()
    TroubledFileSystem.gate.set()
    files = {path.name for path in now.iterdir()}
    assert {"generator.safetensors", "reference.safetensors", "score_estimator.safetensors"} < files
    while any('"part": null' in report for report in generator.saved(Destination(later, background=True))):
        time.sleep(0.01)
    assert {name: (later / name).read_bytes() == (now / name).read_bytes() for name in files} == dict.fromkeys(
        files, True
    )
