"""Weights that trained networks start from, and where those of a student lie in memory."""

from __future__ import annotations

import pytest
import torch

from flashdmd_ray.config import load_config
from flashdmd_ray.roles.networks import load_parts, load_student, trained_engine


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_masters_are_the_files_float32_whatever_the_frozen_parts_are_kept_in(precision) -> None:
    config = load_config(None, ["model.dtype=bfloat16", f"engine.precision={precision}"])
    family = load_parts(config.model, ("denoiser",))
    exact = load_parts(load_config().model, ("denoiser",)).teacher.state_dict()
    assert any(not torch.equal(value, exact[name]) for name, value in family.teacher.float().state_dict().items())
    family = load_parts(config.model, ("denoiser",))
    for role, settings in (("generator", config.generator), ("score", config.score)):
        masters = trained_engine(config, family, role, settings, role).weights()
        assert masters.keys() == exact.keys()
        assert all(torch.equal(value, exact[name]) for name, value in masters.items())


def test_a_student_lies_aligned_wherever_its_file_had_the_weights() -> None:
    family = load_parts(load_config().model, ("denoiser",))
    weights = {}
    for name, value in family.teacher.state_dict().items():
        buffer = torch.empty(value.numel() + 1)
        weights[name] = buffer[1:].view_as(value).copy_(value)
    student = load_student(family, weights)
    assert all(value.data_ptr() % 64 == 0 for value in student.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
