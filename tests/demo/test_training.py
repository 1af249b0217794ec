"""The recipes' training loop: resuming equals never having stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.training import Plan, fit

_PLAN = Plan(steps=12, learning_rate=0.05, warmup=2, ema_decay=0.9, seed=3)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def _train(work: Path, plan: Plan = _PLAN, fail_at: int | None = None) -> torch.Tensor:
    model = _model()

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == fail_at:
            raise KeyboardInterrupt
        return (model(torch.randn(8, 4, generator=generator)) - 1).square().mean()

    fit("toy", model, loss_of, plan, work, save_seconds=0)
    return model.weight.detach().clone()


def test_resumed_training_ends_with_the_same_weights(tmp_path) -> None:
    whole = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", fail_at=7)
    assert torch.equal(_train(tmp_path / "cut"), whole)
    assert torch.equal(_train(tmp_path / "cut"), whole), "a finished training must load, not train again"


def test_state_of_another_plan_is_refused(tmp_path) -> None:
    _train(tmp_path)
    with pytest.raises(ValueError, match="another training plan"):
        _train(tmp_path, Plan(steps=13, learning_rate=0.05))


def test_file_that_names_no_plan_is_refused_in_one_line(tmp_path) -> None:
    for content in ({"model": {}}, torch.zeros(2)):
        torch.save(content, tmp_path / "toy.pt")
        with pytest.raises(ValueError, match=r"toy\.pt is no training state: it names no plan; remove it") as error:
            _train(tmp_path)
        assert "\n" not in str(error.value)


def test_rate_warms_up_and_ends_at_zero() -> None:
    plan = Plan(steps=1000, learning_rate=1.0, warmup=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) == pytest.approx(1.0)
    assert plan.rate(999) < 1e-4
