"""The small training loop that all recipes share: seeded per step, resumable, with progress lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from flashdmd_ray.run.files import new_file


@dataclass(frozen=True, slots=True)
class Plan:
    """Length and learning rate of one training. The rate warms up linearly, then falls to zero along a cosine."""

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.0  # 0: the last weights are the result
    seed: int = 0

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random generator of one step, a function of seed and step only, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Ema:
    """Exponential moving average of a module's trained parameters; early in training it averages over a shorter time."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        trained = dict(model.named_parameters())
        for name, average in self.shadow.items():
            average.lerp_(trained[name], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        trained = dict(model.named_parameters())
        for name, average in self.shadow.items():
            trained[name].copy_(average)


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], torch.Tensor],
    plan: Plan,
    work: Path,
    *,
    save_seconds: float = 120.0,
) -> float:
    """Train `model` in place for `plan.steps` and return the seconds spent, over all resumed runs.

    `loss_of(step, generator)` returns the scalar loss of one step. State is saved in `work/<name>.pt` at most every
    `save_seconds`; when the file exists training goes on from there. With an EMA the model ends with the averaged
    weights. Raises ValueError when the file was made by another plan or names none.
    """
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=plan.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=plan.weight_decay,
    )
    ema = Ema(model, plan.ema_decay)
    state_file = work / f"{name}.pt"
    start, spent = _resume(state_file, plan, model, optimizer, ema)
    began = saved = logged = time.monotonic()
    running = 0.0
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_of(step, step_generator(plan.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if plan.ema_decay:
            ema.update(model, step)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        now = time.monotonic()
        if now - logged > 10 or step + 1 == plan.steps:
            logged = now
            left = (now - began) / (step + 1 - start) * (plan.steps - step - 1)
            print(f"{name}: step {step + 1}/{plan.steps} loss {running:.4f} left {left:.0f} s", flush=True)
        if now - saved > save_seconds or step + 1 == plan.steps:
            saved = now
            _save(state_file, plan, model, optimizer, ema, step + 1, spent + now - began)
    if plan.ema_decay:
        ema.copy_to(model)
    return spent + time.monotonic() - began


def _resume(path: Path, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    if not isinstance(state, dict) or "plan" not in state:
        raise ValueError(f"{path} is no training state: it names no plan; remove it or name another work directory")
    if state["plan"] != asdict(plan):
        raise ValueError(f"{path} was made by another training plan; remove it or name another work directory")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.shadow = state["ema"]
    return state["step"], state["seconds"]


def _save(
    path: Path, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int, seconds: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.shadow, "plan": asdict(plan)}
    with new_file(path) as unfinished:
        torch.save({**state, "step": step, "seconds": seconds}, unfinished)
