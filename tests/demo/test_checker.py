"""The judge accepts real scenes and rejects what contradicts the caption."""

from __future__ import annotations

import pytest
import torch

from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.demo.flawed_scenes import contradicting_pool
from flashdmd_ray.demo.scenes import make_pool

_COUNT = 600


@pytest.fixture(scope="module")
def judge() -> PromptChecker:
    return PromptChecker.load()


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, list[str]]:
    pool = make_pool(_COUNT, "held_out", 99)
    return pool.batch(torch.arange(_COUNT)), pool.captions


def test_accepts_real_held_out_scenes(judge: PromptChecker, real: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = real
    assert judge.correct(images, captions).float().mean() >= 0.97


def test_rejects_scenes_with_one_wrong_fact(judge: PromptChecker) -> None:
    pool = make_pool(_COUNT, "held_out", 98)
    wrong = contradicting_pool(pool, 98, "held_out")
    assert judge.correct(wrong.batch(torch.arange(_COUNT)), pool.captions).float().mean() <= 0.02


@pytest.mark.parametrize("fill", [-1.0, 0.0, 1.0])
def test_rejects_empty_canvases(judge: PromptChecker, fill: float) -> None:
    captions = make_pool(20, "held_out", 97).captions
    assert not judge.correct(torch.full((20, 3, 24, 24), fill), captions).any()


def test_rejects_noise(judge: PromptChecker, real: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = real
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not judge.correct(noise, captions).any()
    assert judge.correct(images.lerp(noise, 0.6), captions).float().mean() < 0.5


def test_verdict_does_not_depend_on_the_batch(judge: PromptChecker, real: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = real
    together = judge.correct(images[:12], captions[:12])
    assert together.tolist() == [
        judge.correct(image[None], [caption]).item() for image, caption in zip(images[:12], captions[:12], strict=True)
    ]


def test_larger_canvas_is_measured_too(judge: PromptChecker, real: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = real
    doubled = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    assert torch.equal(judge.correct(doubled, captions), judge.correct(images, captions))


def test_features_are_flat_floats_that_separate_scenes(
    judge: PromptChecker, real: tuple[torch.Tensor, list[str]]
) -> None:
    features = judge.features(real[0])
    assert features.dtype == torch.float32
    assert features.shape[0] == _COUNT
    assert features.std(0).min() > 0


def test_count_mismatch_and_missing_weights_are_one_line(judge: PromptChecker, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        judge.correct(torch.zeros(2, 3, 24, 24), ["a red 4 on a gray background"])
    with pytest.raises(ValueError, match="missing"):
        PromptChecker.load(tmp_path)
