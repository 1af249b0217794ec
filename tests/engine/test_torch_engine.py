"""The torch engine against AdamW written out by hand, on one rank."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from flashdmd_ray.config import EngineConfig, OptimizerConfig, RateConfig
from flashdmd_ray.engine import Engine, build_engine, init_process_group
from tests.engine.common import RISE_AND_FALL

LR, BETAS, DECAY, EPS = 1e-2, (0.9, 0.999), 0.01, 1e-8
PREFERENCE = RateConfig(lr=1e-3, warmup=0)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))


def engine(
    module: nn.Module | None = None, clip: float = 1e6, rate: dict[str, float] | None = None, **settings: object
) -> Engine:
    optimizer = OptimizerConfig(lr=LR, betas=BETAS, weight_decay=DECAY, clip=clip, **(rate or {"warmup": 0}))
    return build_engine(EngineConfig.model_validate(settings), module or network(), optimizer, role="generator")


def inputs(step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def one_update(trained: Engine, step: int, objective: str = "distillation", rate: RateConfig | None = None) -> float:
    trained.backward(trained(inputs(step)).square().mean())
    return trained.update(objective, rate)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class HandWrittenAdamW:
    """Decoupled weight decay, bias correction, in float64, one set of moments per objective."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.double()
        self.moments = {}

    def update(self, step: int, objective: str, lr: float, clip: float) -> float:
        gradients = torch.autograd.grad(
            self.module(inputs(step).double()).square().mean(), list(self.module.parameters())
        )
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        scale = min(1.0, clip / norm)
        count, first, second = self.moments.setdefault(objective, [0, *([0.0] * 4 for _ in range(2))])
        count = self.moments[objective][0] = count + 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.module.parameters(), gradients, strict=True)):
                first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g * scale
                second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * (g * scale) ** 2
                corrected = second[i] / (1 - BETAS[1] ** count)
                p.mul_(1 - lr * DECAY).sub_(lr * first[i] / (1 - BETAS[0] ** count) / (corrected.sqrt() + EPS))
        return norm


@pytest.mark.parametrize("clip", [1e6, 0.05])
def test_objectives_share_weights_and_nothing_else(clip):
    """Interleaved objectives equal AdamW with separate moments, counters, learning rates and warm-ups."""
    trained, reference = engine(clip=clip, rate={"warmup": 3}), HandWrittenAdamW(network())
    for step in range(6):
        norm = one_update(trained, step)
        assert norm == pytest.approx(
            reference.update(step, "distillation", LR * min(1, (step + 1) / 3), clip), rel=1e-5
        )
        if step >= 3:  # joins later: its own warm-up and bias correction start at 1
            one_update(trained, 100 + step, "preference", RateConfig(lr=3e-3, warmup=2))
            reference.update(100 + step, "preference", 3e-3 * min(1, (step - 2) / 2), clip)
    for got, expected in zip(trained.module.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert (trained.updates(), trained.updates("preference"), trained.updates("other")) == (6, 3, 0)


def test_shared_moments_would_differ():
    """The separate moments matter: the same gradients through one set of moments give other weights."""
    separate, shared = engine(), engine()
    for step in range(3):
        one_update(separate, step)
        one_update(shared, step)
    one_update(separate, 9, "preference")
    one_update(shared, 9)
    assert not same(separate.weights(), shared.weights())


def poisoned(trained: Engine, kind: str) -> torch.Tensor:
    x = trained(inputs(0))
    if kind == "loss":
        return x.square().mean() + float("nan")  # its gradient is finite
    return torch.sqrt(x.square() * 0).sum()  # 0 with an infinite slope: the loss is finite, the gradient is not


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nothing_moves_when_loss_or_gradient_is_not_finite(kind):
    trained, untouched = engine(clip=1.0), engine(clip=1.0)
    for e in (trained, untouched):
        one_update(e, 0)
        one_update(e, 1, "preference")
    before = trained.state()
    for objective, number in (("preference", 2), ("distillation", 2), ("new", 1)):
        trained.backward(poisoned(trained, kind))
        with pytest.raises(
            FloatingPointError, match=f"generator: the {kind} of {objective} update {number} is not finite"
        ):
            trained.update(objective)
        assert same(trained.state(), before)
    for e in (trained, untouched):
        one_update(e, 2)
        one_update(e, 3, "new")
    assert same(trained.state(), untouched.state())


def test_one_backward_per_update():
    trained = engine()
    with pytest.raises(AssertionError, match="update without a backward"):
        trained.update()
    trained.backward(trained(inputs(0)).mean())
    with pytest.raises(AssertionError, match="two backward calls"):
        trained.backward(trained(inputs(0)).mean())
    with pytest.raises(AssertionError, match="scalar"):
        engine().backward(trained(inputs(0)))


def test_replaced_gradients_are_noticed():
    trained = engine()
    trained.module.zero_grad()
    trained.backward(trained(inputs(0)).mean())
    with pytest.raises(AssertionError, match=r"generator: a parameter's .grad was replaced"):
        trained.update()


def test_forwards_without_gradients_and_chained_forwards():
    """Backward simulation runs the network without gradients first, and a loss may use several forwards."""
    a, b = engine(), engine()
    with torch.no_grad():
        a.module(inputs(7))
    for e in (a, b):
        e.backward(e(inputs(0)).mean() + e(inputs(1)).square().mean())
        e.update()
    assert same(a.weights(), b.weights())


def test_n_averages():
    """psi_n = l^n psi_0 + (1 - l^n) theta."""
    psi, theta = engine(network(0)), engine(network(1))
    start, target = psi.weights(), theta.weights()
    for _ in range(10):
        psi.ema_update_from(theta, 0.9)
    for name, got in psi.weights().items():
        expected = 0.9**10 * start[name].double() + (1 - 0.9**10) * target[name].double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert same(theta.weights(), target)
    same_weights = engine(network(1))
    same_weights.ema_update_from(theta, 0.9)
    assert same(same_weights.weights(), target)  # equality is a fixed point, exactly


def test_an_average_survives_the_next_update():
    psi, theta = engine(network(0)), engine(network(1))
    psi.ema_update_from(theta, 0.25)
    moved = engine(network(0))
    with torch.no_grad():
        expected = network(0)
        for p, q in zip(expected.parameters(), network(1).parameters(), strict=True):
            p.lerp_(q, 0.75)
    moved = engine(expected)
    for e in (psi, moved):
        one_update(e, 0)
    assert same(psi.weights(), moved.weights())


def test_an_average_needs_the_same_parameters():
    with pytest.raises(
        ValueError, match="generator cannot average with generator: they must train the same parameters"
    ):
        engine().ema_update_from(engine(nn.Linear(3, 5)), 0.9)


def test_offload_changes_no_bit():
    """Masters apart from the weights, here both on the CPU: the path that a GPU takes."""
    kept, offloaded = engine(clip=0.1), engine(clip=0.1, offload_optimizer=True)
    for e in (kept, offloaded):
        one_update(e, 0)
        e.ema_update_from(e, 0.5)
        one_update(e, 1, "preference")
    assert same(kept.state(), offloaded.state())
    assert same(dict(kept.copy().state_dict()), dict(offloaded.copy().state_dict()))


def test_a_compiled_network_trains_alike():
    """Compiled in truth: the compiler has seen graphs. Copies, such as the reference policy, are plain again."""
    eager, compiled = engine(), engine(compile=True)
    counters["stats"].clear()
    for e in (eager, compiled):
        for step in range(2):
            one_update(e, step)
    assert counters["stats"]["unique_graphs"] > 0
    for name, weights in eager.weights().items():
        torch.testing.assert_close(compiled.weights()[name], weights, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled.copy()(inputs(0)), compiled.module.forward(inputs(0)))


def wide() -> nn.Module:
    """bitsandbytes leaves vectors of fewer than 4096 elements in 32 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 80), nn.SiLU(), nn.Linear(80, 60), nn.SiLU(), nn.Linear(60, 2))


def test_8_bit_moments_without_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"engine.optimizer: 'adamw_8bit' needs bitsandbytes .*flashdmd-ray\[low-memory\]"
    ):
        engine(optimizer="adamw_8bit")


@pytest.mark.parametrize("module", [network, wide])
def test_8_bit_moments_follow_adamw(module):
    """To the precision of 8 bits; each objective has its own; a state written in float32 is taken up again."""
    pytest.importorskip("bitsandbytes", reason="needs the extra low-memory")
    exact, small = engine(module()), engine(module(), optimizer="adamw_8bit")
    for e in (exact, small):
        for step in range(4):
            one_update(e, step)
            one_update(e, 50 + step, "preference", PREFERENCE)
    for name, weights in exact.weights().items():
        assert (weights - small.weights()[name]).square().mean().sqrt() < 0.1 * LR
    codes = small.optimizer_state.moments["preference"]["state1"]
    assert codes.dtype == (torch.uint8 if module is wide else torch.float32)
    resumed = engine(module(), optimizer="adamw_8bit")
    resumed.load_state(small.state())
    assert (resumed.updates(), resumed.updates("preference")) == (4, 4)
    for e in (small, resumed):
        one_update(e, 9)
    for name, weights in small.weights().items():
        assert (weights - resumed.weights()[name]).square().mean().sqrt() < 0.02 * LR


def test_weights_are_what_load_state_dict_takes():
    trained = engine()
    one_update(trained, 0)
    fresh = network(5)
    fresh.load_state_dict(trained.weights())
    assert torch.equal(fresh(inputs(0)), trained.module(inputs(0)))
    weights = trained.weights()
    weights["0.weight"].zero_()  # copies: theirs to keep
    assert not same(weights, trained.weights())


def test_resume_is_bit_for_bit():
    def schedule(trained: Engine, steps: range) -> None:
        for step in steps:
            one_update(trained, step)
            if step >= 2:
                one_update(trained, 50 + step, "preference", PREFERENCE)

    straight, stopped = engine(clip=0.1, rate=RISE_AND_FALL), engine(clip=0.1, rate=RISE_AND_FALL)
    schedule(straight, range(6))
    schedule(stopped, range(3))
    resumed = engine(network(9), clip=0.1, rate=RISE_AND_FALL)
    one_update(resumed, 77, "forgotten")  # loading replaces everything
    resumed.load_state(stopped.state())
    schedule(resumed, range(3, 6))
    assert same(resumed.state(), straight.state())


def test_buffers_travel():
    """Spectral norm keeps its power iteration in buffers: a resume without them would not be exact."""
    trained = engine(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)))
    one_update(trained, 0)
    resumed = engine(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)))
    resumed.load_state(trained.state())
    assert any(name.startswith("buffers/") for name in trained.state())
    for e in (trained, resumed):
        one_update(e, 1)
    assert same(trained.state(), resumed.state())


def test_state_that_does_not_fit_is_refused_before_any_change():
    trained = engine()
    one_update(trained, 0)
    state, before = trained.state(), trained.state()
    other = engine(nn.Linear(3, 5)).state()
    misshapen = state | {"moments/distillation/exp_avg/0.bias": torch.zeros(4)}
    missing = {k: v for k, v in state.items() if k != "moments/distillation/exp_avg_sq/2.bias"}
    for wrong, message in (
        (other, "0.weight"),
        (misshapen, "exp_avg: saved '0.bias' has shape"),
        (missing, "lacks '2.bias'"),
    ):
        with pytest.raises(ValueError, match=f"generator: .*{message}") as caught:
            trained.load_state(wrong)
        assert "\n" not in str(caught.value)
        assert same(trained.state(), before)


def test_a_group_of_several_ranks_needs_a_port():
    with pytest.raises(ValueError, match="rank 2 is not one of a group of 2"):
        init_process_group(2, 2, port=1)
    with pytest.raises(ValueError, match=r"a group of 2 ranks needs a port on 127\.0\.0\.1"):
        init_process_group(0, 2)


def test_frozen_parameters_stay():
    module = network()
    module[0].requires_grad_(False)
    frozen = copy.deepcopy(module[0].state_dict())
    trained = engine(module)
    one_update(trained, 0)
    assert same(module[0].state_dict(), frozen)
    assert set(trained.weights()) == {"2.weight", "2.bias"}
    with pytest.raises(ValueError, match="Linear has no trained parameter"):
        engine(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"generator: parameter 'weight' is torch.bfloat16"):
        engine(nn.Linear(2, 2, dtype=torch.bfloat16))


def test_a_parameter_that_took_no_part_counts_as_zero_gradient():
    """ZeRO treats it so; plain AdamW would skip it, and its moments would depend on the engine."""
    module = network()
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    trained = engine(module)
    one_update(trained, 0)
    assert torch.allclose(module.unused, torch.full((3,), 1 - LR * DECAY))
