"""The two sides of every comparison between an engine on several ranks and plain torch in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine import Engine, build_engine

BATCH = 8
LR, BETAS, DECAY = 1e-2, (0.9, 0.99), 0.1
RISE_AND_FALL = {"warmup": 2, "decay": 5, "floor": 0.1}
FACTORS = (0.5, 1.0, 0.7, 0.4, 0.1, 0.1)
"""Of `lr`, in the first six updates at RISE_AND_FALL."""
KINDS = {
    "torch": {"kind": "torch"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}
OFFLOADED = {f"{name}-offload": kind | {"offload_optimizer": True} for name, kind in KINDS.items()}
ALL_KINDS = KINDS | OFFLOADED


class Network(nn.Module):
    """Odd sizes, so that slices cut through parameters and need padding. One matrix is large enough (> 100,000) for ZeRO stage 3 to
    slice it; the others it keeps whole. `spare` takes part when asked, `unused` never."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 331), nn.SiLU(), nn.Linear(331, 331))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(331, 2))
        self.spare = nn.Linear(331, 331, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, with_spare: bool = False) -> Tensor:
        hidden = self.body(x.to(self.unused.dtype))
        return self.head(self.spare(hidden) if with_spare else hidden).float()


def engine(
    kind: str,
    seed: int = 0,
    clip: float = 1e6,
    rate: dict[str, float] | None = None,
    role: str = "generator",
    module: nn.Module | None = None,
    source: dict[str, Tensor] | None = None,
    **settings: object,
) -> Engine:
    optimizer = OptimizerConfig(lr=LR, betas=BETAS, weight_decay=DECAY, clip=clip, **(rate or {"warmup": 0}))
    config = EngineConfig.model_validate(ALL_KINDS[kind] | settings)
    return build_engine(config, module or Network(seed), optimizer, role=role, source=source)


class PlainTorch:
    """One process, the whole batch, torch.optim.AdamW once per objective, torch's own clipping."""

    def __init__(self, seed: int = 0, clip: float = 1e6) -> None:
        self.module, self.clip = Network(seed), clip
        self.optimizers: dict[str, torch.optim.AdamW] = {}

    def update(self, objective: str = "distillation", lr: float = LR) -> float:
        parameters = list(self.module.parameters())
        if objective not in self.optimizers:
            self.optimizers[objective] = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=DECAY)
        optimizer = self.optimizers[objective]
        optimizer.param_groups[0]["lr"] = lr
        for p in parameters:  # a parameter that took no part counts as zero gradient
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    def step(self, step: int, objective: str = "distillation", lr: float = LR) -> float:
        mean_loss(self.module, batch(step)).backward()
        return self.update(objective, lr)


def batch(step: int, count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(step))


def shard(values: Tensor) -> Tensor:
    """This rank's equal part."""
    if not dist.is_initialized():
        return values
    return values.chunk(dist.get_world_size())[dist.get_rank()]


def mean_loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].cos()).square().mean()


def one_update(trained: Engine, step: int, objective: str = "distillation", lr: float | None = None) -> float:
    trained.backward(mean_loss(trained, shard(batch(step))))
    return trained.update(objective, None if lr is None else trained.settings.model_copy(update={"lr": lr}))


def history(trained: Engine, steps: range) -> None:
    for step in steps:
        one_update(trained, step)
        one_update(trained, 50 + step, "preference", lr=1e-3)


def assert_equal_weights(trained: Engine, module: nn.Module, tolerance: float = 1e-5) -> None:
    """Both the masters, on rank 0, and what the next forward will use, on all: root mean square difference within `tolerance`.

    Single elements may differ by more: AdamW divides by the root of the second moment, which turns the rounding of a gradient near zero
    into a visible part of an update (of size LR = 1e-2).
    """
    weights, used, live = trained.weights(), trained.copy().state_dict(), trained.live_weights()
    assert bool(weights) == bool(live) == (not dist.is_initialized() or dist.get_rank() == 0)
    assert all(torch.equal(live[name], used[name]) and live[name].dtype == used[name].dtype for name in live)
    for name, expected in module.state_dict().items():
        for got in [used[name], *([weights[name]] if weights else [])]:
            difference = (got.double() - expected.double()).abs()
            assert difference.square().mean().sqrt() <= tolerance, f"{name} differs by {difference.max()}"
            assert difference.max() <= 200 * tolerance, f"{name} differs by {difference.max()}"


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"bits differ: {different}"
