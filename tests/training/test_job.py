"""The whole job on the shipped demo weights, small: what it leaves behind, and that stopping and resuming changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, read_state
from flashdmd_ray.config import Config, dump_config, parse_config
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.serving.model_sources import open_source
from flashdmd_ray.training import job
from flashdmd_ray.training.step_times import MEASURED
from flashdmd_ray.training.training_run import TrainingRun

STEPS = 3
ROLES = ("generator", "score_estimator", "discriminator", "reference")


def small(root: Path, name: str, **changes: object) -> Config:
    tree = {
        "steps": STEPS,
        "batch": 4,
        "runtime": "local",
        "run": {"dir": str(root), "name": name},
        "adversarial": {"balance": 0.3},
        "preference": {"updates": 1, "batch": 2, "start_step": 1, "threshold": 0.0},
        "monitor": {"warmup": 2, "window": 2},
        "checkpoint": {"every": 50},
        "tracking": {"enabled": False, "samples_every": 50},
        "evaluation": {"samples": 6, "batch": 6, "teacher_steps": 2, "student_steps": [4]},
    }
    return parse_config(tree | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(root) -> Path:
    assert job.run_job(small(root, "straight")) == 0
    return root / "straight"


def repeatable(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.startswith(MEASURED)}


def state_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == STEPS
    return {
        f"{role}:{name}": tensor
        for role in ROLES
        for name, tensor in load_tensors(checkpoint / f"{role}.safetensors").items()
    }


def test_the_driver_of_a_training_imports_no_library_of_networks():
    code = "import sys, flashdmd_ray.training.job; sys.exit(bool({'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_finished_run_has_everything(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert "preference/loss" not in records[0]
    assert {"matching/real_fake_gap", "discriminator/accuracy_fake", "preference/loss", "reward/latent"} <= set(
        records[2]
    )
    assert records[-1]["count/generator_updates"] == 3
    assert records[-1]["count/samples"] == 12
    report = json.loads((finished / "report.json").read_text())
    assert [row["name"].split(",")[0] for row in report["rows"]] == ["real images", "teacher", "before", "student"]
    assert (finished / "grid.png").stat().st_size > 1000
    assert (finished / "samples" / "step-000003.png").is_file()


def test_the_export_draws_the_run_s_own_pictures(finished):
    """Plain diffusers, 4 steps, no guidance, from the seeds in the card's facts."""
    from flashdmd_ray.results.evaluation_data import demo_held_out
    from flashdmd_ray.results.student import student_weights
    from flashdmd_ray.roles.image_sampling import sample_all_images, seed_of, student_sampler
    from flashdmd_ray.roles.networks import load_family, load_student

    config = small(finished.parent, "straight")
    family = load_family(config.model)
    checkpoint = latest_checkpoint(finished / "checkpoints")
    network = load_student(family, student_weights(config, family, checkpoint))
    texts = demo_held_out(3, 1).texts
    ours = sample_all_images(
        family, student_sampler("student", family, network, config.sampling.timesteps), texts, range(3), 1, 3
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(finished / "export", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed_of(1, i)) for i in range(3)]
    theirs = pipeline(
        list(texts), num_inference_steps=4, guidance_scale=0.0, generator=generators, output_type="pt"
    ).images
    torch.testing.assert_close(theirs * 2 - 1, ours, atol=2e-3, rtol=0)


def test_a_run_is_served_from_its_newest_checkpoint_while_it_has_no_export(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "training", ignore=shutil.ignore_patterns("export"))
    source = open_source(str(run))
    assert source.signature() == f"checkpoint step-{STEPS:08d}"
    source.fetch(tmp_path / "fetched", timeout_s=300)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "fetched" / weights).read_bytes() == (finished / "export" / weights).read_bytes()
    assert "unet" in open_source(str(finished)).signature()


def test_the_same_command_again_says_it_is_finished(finished, capsys):
    assert job.run_job(small(finished.parent, "straight")) == 0
    assert "is finished (3 steps)" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM])  # SIGINT: tests/runtime/test_lifecycle.py
def test_interrupted_and_resumed_equals_never_stopped(root, finished, monkeypatch, number):
    """The signal arrives inside step 2: the step is finished, a checkpoint written, and the rest continues bit for bit."""
    name = f"resumed-{number}"
    config = small(root, name)
    finish = TrainingRun.finish

    def interrupt(self, step, metrics):
        if step == 1 and not self.stop.requested:
            os.kill(os.getpid(), number)
        finish(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "finish", interrupt)
        assert job.run_job(config) == 128 + number
    assert read_state(latest_checkpoint(root / name / "checkpoints"))["step"] == 2
    assert job.run_job(config) == 0
    straight, resumed = state_of(finished), state_of(root / name)
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    one, two = (read_metrics(run / "metrics.jsonl") for run in (finished, root / name))
    assert [repeatable(record) for record in one] == [repeatable(record) for record in two]


@pytest.mark.parametrize("timesteps", [(999,), tuple(range(999, 0, -125))])
def test_one_and_eight_steps_train(root, timesteps):
    preference = {"updates": 1 if len(timesteps) > 1 else 0, "batch": 2}
    config = small(
        root,
        f"steps-{len(timesteps)}",
        steps=1,
        sampling={"timesteps": list(timesteps)},
        preference=preference,
        evaluation={"samples": 6, "batch": 6, "teacher_steps": 2, "student_steps": [len(timesteps)]},
    )
    assert job.run_job(config) == 0


def test_another_configuration_does_not_resume_a_run(finished):
    with pytest.raises(ValueError, match="batch was 4 and is now 8"):
        job.run_job(small(finished.parent, "straight", batch=8))


def test_a_terminal_that_is_closed_ends_the_job_in_order_and_mlflow_hears_of_it(root):
    """As `joint_train.py ... 2>&1 | tee log` in a terminal: the pipe's reader goes, and SIGHUP reaches the whole process group."""
    config = small(root, "closed", steps=400, tracking={"samples_every": 400}, evaluation={"samples": 0})
    file = root / "closed.yaml"
    file.write_text(dump_config(config))
    command = [
        sys.executable,
        "-c",
        "import sys; from flashdmd_ray.training.cli import main; sys.exit(main())",
        str(file),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "step   1/400" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(timeout=300) == 128 + signal.SIGHUP
    saved = read_state(latest_checkpoint(root / "closed" / "checkpoints"))
    assert saved["step"] == read_metrics(root / "closed" / "metrics.jsonl")[-1]["step"] < 400
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    tracked = mlflow.MlflowClient().get_run(json.loads((root / "closed" / "mlflow.json").read_text())["run_id"])
    assert tracked.info.status == "KILLED"
    assert tracked.data.metrics.keys() == read_metrics(root / "closed" / "metrics.jsonl")[-1].keys() - {"step"}
