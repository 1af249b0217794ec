"""Figures against closed forms, samplers that are reproducible, and the commands on a run folder."""

import io
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from rich.console import Console

from flashdmd_ray.checkpoint import save_tensors, write_checkpoint
from flashdmd_ray.config import dump_config, parse_config
from flashdmd_ray.demo import weights_path
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.evaluation import (
    Row,
    SampleNoise,
    Sampler,
    demo_held_out,
    evaluate,
    every_kth,
    frechet_distance,
    mean_pairwise_distance,
    print_table,
    sample_images,
    seed_of,
    student_sampler,
    teacher_sampler,
)
from flashdmd_ray.finished_run import evaluate_command, export_command
from flashdmd_ray.grid import draw_grid, write_grid
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.sdxl import SDXL
from tests.tiny import save_sdxl


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 200, seed: int = 0) -> torch.Tensor:
    """Samples whose empirical mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def random_covariance(width: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(width, width))
    return root @ root.T + 0.1 * np.eye(width)


def test_frechet_distance_of_axis_aligned_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    first = gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    second = gaussian(np.array([1.0, 0.0, 3.5]), np.diag([4.0, 4.0, 0.25]), count=311, seed=1)
    expected = (2**2 + 0.5**2) + (1**2 + 0**2 + 2.5**2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_correlated_gaussians_against_the_matrix_square_root():
    one, two, gap = random_covariance(6, 1), random_covariance(6, 2), np.arange(6.0)
    expected = gap @ gap + np.trace(one + two - 2 * scipy.linalg.sqrtm(one @ two).real)
    first, second = gaussian(np.zeros(6), one), gaussian(gap, two, seed=1)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(64, rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least 2"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "at least 2"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "not finite"),
    ],
)
def test_frechet_distance_refuses(first, second, says):
    with pytest.raises(ValueError, match=says):
        frechet_distance(first, second)


def test_mean_pairwise_distance():
    groups = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    assert mean_pairwise_distance(groups) == pytest.approx((10 / 3 + 0) / 2)


def test_fewer_steps_start_at_the_first_timestep():
    timesteps = (999, 749, 499, 249)
    assert [every_kth(timesteps, k) for k in (1, 2, 4)] == [(999,), (999, 499), timesteps]
    with pytest.raises(ValueError, match="3 steps are not evenly spaced"):
        every_kth(timesteps, 3)


def test_noise_is_that_of_one_generator_per_sample():
    noise = SampleNoise([7, 3], (3, 5, 5), 11, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed_of(11, 3))
    for hop in range(3):
        assert torch.equal(noise(hop)[1], torch.randn(1, 3, 5, 5, generator=generator)[0])
    with pytest.raises(AssertionError, match="when 3 is next"):
        noise(1)
    assert seed_of(11, 3) != seed_of(12, 3)


def test_samples_depend_on_seed_and_position_and_not_on_the_batch(tmp_path):
    family = SDXL.from_pretrained(str(save_sdxl(tmp_path / "sdxl")))
    sampler = student_sampler("student", family, family.teacher, (999, 499))
    assert (sampler.name, sampler.nfe) == ("student, 2 steps", 2)
    texts = ["a", "b", "a", "d", "e"]

    def sample(seed: int, batch: int) -> torch.Tensor:
        return torch.cat(list(sample_images(family, sampler, texts, range(5), seed, batch)))

    whole = sample(0, 5)
    torch.testing.assert_close(sample(0, 2), whole, rtol=0, atol=1e-5)
    assert (whole[0] - whole[2]).abs().max() > 0.01, "the same prompt at another position has other noise"
    assert (sample(1, 5) - whole).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert whole.abs().max() <= 1


def test_the_table_tells_a_perfect_sampler_from_a_useless_one():
    """With the shipped judge, reward and autoencoder: one sampler knows the real images, the other draws grey noise."""
    family = SDXL.from_pretrained(str(weights_path("teacher")))
    held_out, count = demo_held_out(32, 0), 32
    latents = family.encode_images(held_out.twins)
    known = {row.numpy().tobytes(): x for row, x in zip(family.encode(held_out.texts).pooled, latents, strict=True)}

    def remember(conditioning, draw_noise):
        return torch.stack([known[row.numpy().tobytes()] for row in conditioning.pooled])

    samplers = [Sampler("perfect", 0, remember), Sampler("useless", 1, lambda _c, draw_noise: draw_noise(0))]
    said: list[str] = []
    judge, reward = PromptChecker.load(), build_reward("pickscore", str(weights_path("reward")))
    rows = evaluate(family, samplers, held_out, judge, reward, seed=0, batch=20, say=said.append)
    real, perfect, useless = rows
    assert (real.name, real.nfe, real.samples) == ("real images", 0, count)
    assert real.accuracy >= 0.9
    assert perfect.accuracy >= 0.9
    assert useless.accuracy <= 0.1
    assert perfect.frechet == pytest.approx(real.frechet, rel=0.5)
    assert useless.frechet > 2 * real.frechet, "32 samples alone put real images far from each other"
    assert perfect.reward > useless.reward
    assert perfect.diversity == pytest.approx(0, abs=1e-6), "the same image again and again"
    assert real.diversity > 0
    assert [line.split(":")[0] for line in said] == ["perfect", "useless"]


def test_teacher_sampler_counts_the_forwards_of_guidance(tmp_path):
    family = SDXL.from_pretrained(str(save_sdxl(tmp_path / "sdxl")))
    calls: list[int] = []
    family.teacher.register_forward_hook(lambda *_: calls.append(1))
    for scale, forwards in ((3.0, 6), (1.0, 3)):
        calls.clear()
        sampler = teacher_sampler(family, 3, scale)
        list(sample_images(family, sampler, ["a"], [0], 0, 1))
        assert len(calls) == sampler.nfe == forwards


def test_held_out_scenes_have_other_captions_and_handwriting_than_training():
    from flashdmd_ray.demo.scenes import sample_scenes

    held_out = demo_held_out(200, 3)
    training = {scene.caption for scene in sample_scenes(3000, "train", 0) if scene.attributes.relation}
    assert not training & set(held_out.texts)
    assert (held_out.images - held_out.twins).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert demo_held_out(200, 3).texts == held_out.texts


def test_grid_enlarges_pixels_without_blurring(tmp_path):
    images = torch.full((2, 3, 24, 24), -1.0)
    images[1, 0, 5, 7] = 1.0  # one red pixel
    path = write_grid(tmp_path / "new" / "grid.png", [("teacher, 25 steps", images)], ["a red 4", "a blue 7"])
    assert list(path.parent.iterdir()) == [path]
    picture = np.asarray(draw_grid([("teacher, 25 steps", images)], ["a red 4", "a blue 7"]).convert("RGB")).astype(int)
    red = (picture == (255, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(red)
    assert red.sum() == 25, "a pixel of a 24x24 image becomes 5x5"
    assert np.ptp(rows) == np.ptp(columns) == 4
    assert (picture[: rows.min() - 30] < 100).any(), "captions stand above"
    assert (picture[:, :150] < 100).any(), "and labels to the left"


def test_table_lists_every_sampler():
    out = io.StringIO()
    rows = [Row("real images", 0, 9.5, 0.99, 6.7, 13.0, 500), Row("student, 4 steps", 4, 41.254, 0.913, 6.1, 12.5, 500)]
    print_table(rows, Console(file=out, width=110))
    assert "500 held-out prompts" in out.getvalue()
    (line,) = [line for line in out.getvalue().splitlines() if "student, 4 steps" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "student, 4 steps",
        "4",
        "41.25",
        "0.913",
        "6.100",
        "12.500",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it: configuration and one checkpoint; its student is the teacher, slightly moved."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    path.mkdir()
    evaluation = {"teacher_steps": 2, "student_steps": [1, 4], "guidance_scale": 2.0}
    (path / "config.yaml").write_text(dump_config(parse_config({"evaluation": evaluation, "runtime": "local"})))
    student = SDXL.from_pretrained(str(weights_path("teacher")), parts=["denoiser"]).denoiser()
    weights = {f"weights/{name}": value * 1.01 for name, value in student.state_dict().items()}

    def save(directory):
        save_tensors(directory / "generator.safetensors", weights | {"updates/distillation": torch.tensor(3)})

    state = {"step": 3, "counters": {"generator_updates": 3}, "seconds": 12.3}
    write_checkpoint(path / "checkpoints", 3, save, state=state, keep=1)
    return path


def test_a_run_is_evaluated_and_exported(run, capsys):
    assert evaluate_command([str(run), "--samples", "4", "--seed", "5"]) == 0
    from_checkpoint = json.loads((run / "evaluation.json").read_text())
    assert from_checkpoint["student"] == "checkpoints/step-00000003"
    assert [row["nfe"] for row in from_checkpoint["rows"]] == [0, 4, 1, 4, 1, 4]
    assert "student, 4 steps" in capsys.readouterr().out

    assert export_command([str(run)]) == 0
    assert json.loads((run / "export" / "flashdmd.json").read_text())["timesteps"] == [999, 749, 499, 249]
    assert "generator updates: 3" in (run / "export" / "README.md").read_text()

    assert evaluate_command([str(run), "--samples", "4", "--seed", "5"]) == 0
    from_export = json.loads((run / "evaluation.json").read_text())
    assert from_export["student"] == "export"
    assert from_export["rows"] == from_checkpoint["rows"], "export and checkpoint hold the same student"


@pytest.mark.parametrize("command", [evaluate_command, export_command])
def test_wrong_folders_are_refused_in_one_line(command, tmp_path, capsys):
    assert command([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "config.yaml").write_text(dump_config(parse_config({})))
    assert command([str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first == f"error: {tmp_path / 'nowhere'} is no run folder (it has no config.yaml): give one such as runs/demo"
    )
    assert second.startswith(f"error: {tmp_path} has n")
    assert second.endswith("train it to its first one")


def test_impossible_options_are_refused(run, tmp_path, capsys):
    assert evaluate_command([str(run), "--samples", "1"]) == 2
    assert "--samples 1" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("years of work")
    assert export_command([str(run), "--out", str(tmp_path)]) == 2
    assert "is no earlier export" in capsys.readouterr().err
