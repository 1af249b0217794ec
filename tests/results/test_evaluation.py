"""Figures against closed forms, samplers that are reproducible, and the commands on a run folder."""

import io
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from rich.console import Console

from flashdmd_ray.commands.evaluate import evaluate_command
from flashdmd_ray.commands.export import export_command
from flashdmd_ray.config import dump_config, parse_config
from flashdmd_ray.demo import weights_path
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.results.evaluation import (
    Comparison,
    EvalMetrics,
    Row,
    as_json,
    evaluate,
    frechet_distance,
    mean_pairwise_distance,
    print_table,
)
from flashdmd_ray.results.evaluation_data import Reference, demo_held_out
from flashdmd_ray.results.grid import draw_grid, write_grid
from flashdmd_ray.roles.image_sampling import (
    SampleNoise,
    Sampler,
    sample_all_images,
    sample_images,
    seed_of,
    student_sampler,
    teacher_sampler,
)
from tests.checkpoint.writing import write
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
    """Evenly spaced among the generator's own timesteps."""
    few = parse_config({"evaluation": {"student_steps": [1, 2, 4]}}).student_timesteps
    assert few == {1: (999,), 2: (999, 499), 4: (999, 749, 499, 249)}


@pytest.mark.parametrize(("scale", "shown"), [(None, 1.25), (3.0, 3.0)])
def test_the_teacher_is_shown_as_it_is_matched_unless_told_otherwise(scale, shown):
    config = parse_config({"matching": {"guidance_scale": 1.25}, "evaluation": {"guidance_scale": scale}})
    assert config.teacher_guidance == shown


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
        return sample_all_images(family, sampler, texts, range(5), seed, batch)

    whole = sample(0, 5)
    torch.testing.assert_close(sample(0, 2), whole, rtol=0, atol=1e-5)
    side_by_side = sample_images(family, sampler, texts, range(5), 0, 2, at_once=3)
    assert torch.equal(torch.cat(list(side_by_side)), sample(0, 2))
    assert (whole[0] - whole[2]).abs().max() > 0.01, "the same prompt at another position has other noise"
    assert (sample(1, 5) - whole).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert whole.abs().max() <= 1


def test_the_table_tells_a_perfect_sampler_from_a_useless_one():
    """With the shipped judge, reward and autoencoder: one sampler knows the real images, the other draws grey noise."""
    family = SDXL.from_pretrained(str(weights_path("teacher")))
    held_out, count = demo_held_out(80, 0), 80
    latents = family.encode_images(held_out.twins)
    known = {row.numpy().tobytes(): x for row, x in zip(family.encode(held_out.texts).pooled, latents, strict=True)}

    def remember(conditioning, noise_sampler):
        return torch.stack([known[row.numpy().tobytes()] for row in conditioning.pooled])

    samplers = [Sampler("perfect", 0, remember), Sampler("useless", 1, lambda _c, noise_sampler: noise_sampler(0))]
    said: list[str] = []
    judge, reward = PromptChecker.load(), build_reward("pickscore", str(weights_path("reward")))
    reference = Reference(held_out.texts, "held-out prompts", held_out.images.split(20), held_out.twins)
    eval_metrics = EvalMetrics("features", judge.features, judge.correct, {"pickscore": reward}, ["pickscore"])
    table = evaluate(family, samplers, reference, eval_metrics, seed=0, batch=20, say=said.append)
    real, perfect, useless = table.rows
    assert (real.name, real.nfe, real.samples) == ("real images", 0, count)
    assert real.accuracy >= 0.9
    assert perfect.accuracy >= 0.9
    assert useless.accuracy <= 0.1
    assert perfect.frechet == pytest.approx(real.frechet, rel=0.5)
    assert useless.frechet > 2 * real.frechet, "so few samples alone put real images far from each other"
    assert perfect.rewards["pickscore"] > useless.rewards["pickscore"]
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


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(16, 24, (80, 120)), (64, 160, (64, 160)), (1024, 512, (256, 128))]
)
def test_grid_keeps_the_shape_of_images(height, width, shown):
    """A white image on white paper, but for two black corners."""
    image = torch.ones(1, 3, height, width)
    image[:, :, : height // 8, : width // 8] = image[:, :, -height // 8 :, -width // 8 :] = -1
    picture = np.asarray(draw_grid([("", image)], [""])).astype(int)
    rows, columns = np.nonzero(picture.max(axis=2) < 60)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == shown


def printed(table: Comparison) -> tuple[str, list[list[str]]]:
    """Title and cells, heading first."""
    out = io.StringIO()
    print_table(table, Console(file=out, width=140))
    title, *lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    return title, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_the_table_has_a_column_for_what_was_measured():
    rows = [
        Row("real images", 0, 500, 9.5, 0.99, {"pickscore": 6.7}, 13.0),
        Row("student, 4 steps", 4, 500, 41.254, 0.913, {"pickscore": 6.1}, 12.5),
    ]
    title, (heading, _, student) = printed(Comparison(rows, "held-out prompts", "a judge's features", ["pickscore"]))
    assert title == "500 held-out prompts; distances between a judge's features; * optimised in training"
    assert heading == ["sampler", "NFE", "Frechet distance", "prompt accuracy", "pickscore*", "diversity"]
    assert student == ["student, 4 steps", "4", "41.25", "0.913", "6.100", "12.500"]

    bare = Comparison(
        [Row("student, 4 steps", 4, 9, None, None, {"a": 1.0, "b": 2.0}, None)], "prompts of x.txt", "", ()
    )
    assert printed(bare) == (
        "9 prompts of x.txt",
        [["sampler", "NFE", "a", "b"], ["student, 4 steps", "4", "1.000", "2.000"]],
    )
    (row,) = as_json(bare)["rows"]
    assert row.keys() == {"name", "nfe", "samples", "rewards", "margins", "wins"}, "what was not measured is not there"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it: configuration and one checkpoint; its student is the teacher, slightly moved."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    path.mkdir()
    evaluation = {"teacher_steps": 2, "student_steps": [1, 4], "guidance_scale": 2.0, "batch": 100}
    (path / "config.yaml").write_text(dump_config(parse_config({"evaluation": evaluation, "runtime": "local"})))
    student = SDXL.from_pretrained(str(weights_path("teacher")), parts=["denoiser"]).denoiser()
    weights = {f"weights/{name}": value * 1.01 for name, value in student.state_dict().items()}
    state = {"step": 3, "counters": {"generator_updates": 3}, "seconds": 12.3}
    write(path / "checkpoints", 3, values=weights | {"updates/distillation": torch.tensor(3)}, state=state)
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
    assert second.startswith(f"error: {tmp_path}")
    assert second.endswith(("to its first one", "to the first one"))


def test_impossible_options_are_refused(run, tmp_path, capsys):
    assert evaluate_command([str(run), "--samples", "1"]) == 2
    assert "--samples 1" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("years of work")
    assert export_command([str(run), "--out", str(tmp_path)]) == 2
    assert "is no earlier export" in capsys.readouterr().err
