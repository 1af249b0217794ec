"""Both engines against plain torch in two real processes, and DeepSpeed against the torch engine bit for bit in one.

Importing DeepSpeed takes seconds, so all checks run in two launches of this file: two ranks over gloo, then one rank that continues what
the two saved. Every check is a function named in CHECKS; pytest shows each as a test of its own.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashdmd_ray.checkpoint import load_tensors, save_tensors
from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine import Engine, build_engine, free_port, init_process_group

DEADLINE_S = 400
BATCH = 8
LR, BETAS, DECAY = 1e-2, (0.9, 0.99), 0.1
KINDS = ("torch", "deepspeed")


# ---- the two sides of every comparison


def network(seed: int = 0) -> nn.Module:
    """Odd sizes, so that ZeRO's slices cut through parameters and need padding; one parameter that takes no part."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 2))
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return module


def engine(kind: str, seed: int = 0, clip: float = 1e6, warmup: int = 0, role: str = "generator") -> Engine:
    optimizer = OptimizerConfig(lr=LR, betas=BETAS, weight_decay=DECAY, clip=clip, warmup=warmup)
    return build_engine(EngineConfig(kind=kind), network(seed), optimizer, role=role)


class PlainTorch:
    """One process, the whole batch, torch.optim.AdamW once per objective, torch's own clipping."""

    def __init__(self, seed: int = 0, clip: float = 1e6) -> None:
        self.module, self.clip = network(seed), clip
        self.optimizers: dict[str, torch.optim.AdamW] = {}

    def update(self, objective: str = "distillation", lr: float = LR) -> float:
        parameters = list(self.module.parameters())
        if objective not in self.optimizers:
            self.optimizers[objective] = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=DECAY)
        optimizer = self.optimizers[objective]
        optimizer.param_groups[0]["lr"] = lr
        self.module.unused.grad = torch.zeros(3)
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
    if not torch.distributed.is_initialized():
        return values
    return values.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def mean_loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].cos()).square().mean()


def one_update(trained: Engine, step: int, objective: str = "distillation", lr: float | None = None) -> float:
    trained.backward(mean_loss(trained, shard(batch(step))))
    return trained.update(objective, lr=lr)


def assert_equal_weights(trained: Engine, module: nn.Module, tolerance: float = 2e-6) -> None:
    """Both the masters and what the next forward will use."""
    for weights in (trained.weights(), trained.module.state_dict()):
        for name, expected in module.state_dict().items():
            torch.testing.assert_close(
                weights[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"bits differ: {different}"


# ---- checks in two ranks


def check_mean_over_ranks(kind: str, directory: Path) -> None:
    trained, plain = engine(kind), PlainTorch()
    for step in range(5):
        assert one_update(trained, step) == pytest.approx(plain.step(step), rel=1e-5)
    assert_equal_weights(trained, plain.module)


def check_objectives_keep_their_own_moments(kind: str, directory: Path) -> None:
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        one_update(trained, step)
        plain.step(step)
        if step >= 1:
            one_update(trained, 50 + step, "preference", lr=1e-3)
            plain.step(50 + step, "preference", lr=1e-3)
    assert_equal_weights(trained, plain.module)


def check_two_gradients_through_one_backward_of_a_sum(kind: str, directory: Path) -> None:
    """The generator's update: two forwards, two critics' gradients, after forwards without gradients. Plain torch adds two backwards."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(3):
        x, y, g, h = (batch(100 * step + k)[:, :width] for k, width in ((0, 3), (1, 3), (2, 2), (3, 2)))
        with torch.no_grad():
            trained.module(x)
        coarse, fine = trained(shard(x)), trained(shard(y))
        # Critics answer with gradients of means over the rank's samples; the average over ranks makes the mean over all.
        trained.backward((coarse * shard(g)).sum() + (fine * shard(h)).sum())
        trained.update()
        plain.module(x).backward(g / 2)
        plain.module(y).backward(h / 2)
        plain.update()
    assert_equal_weights(trained, plain.module)


def check_second_backward_is_refused(kind: str, directory: Path) -> None:
    trained = engine(kind)
    trained.backward(mean_loss(trained, shard(batch(0))))
    with pytest.raises(AssertionError, match="two backward calls before one update"):
        trained.backward(mean_loss(trained, shard(batch(1))))


def check_clipping(kind: str, directory: Path) -> None:
    """A small limit scales as torch does; a limit above the norm leaves large gradients alone (DeepSpeed's default would cut at 1)."""
    for clip, scale in ((0.05, 1.0), (1e6, 1000.0)):
        trained, plain, norms = engine(kind, clip=clip), PlainTorch(clip=clip), []
        for step in range(4):
            factor = scale if step == 0 else 1.0  # one outlier: AdamW alone hides a constant factor
            trained.backward(factor * mean_loss(trained, shard(batch(step))))
            (factor * mean_loss(plain.module, batch(step))).backward()
            norms.append(plain.update())
            assert trained.update() == pytest.approx(norms[-1], rel=1e-5)
        assert min(norms) > clip or max(norms) > 1, "this check would pass without clipping"
        assert_equal_weights(trained, plain.module)


def check_warm_up(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, warmup=4), PlainTorch()
    for step in range(6):
        one_update(trained, step)
        plain.step(step, lr=LR * min(1, (step + 1) / 4))
    assert_equal_weights(trained, plain.module)


def check_coupling_reaches_the_masters(kind: str, directory: Path) -> None:
    """Two engines in one process; the coupled one goes on training from the coupled weights."""
    score, generator = engine(kind, seed=0, role="score estimator"), engine(kind, seed=1)
    plain, plain_generator = PlainTorch(seed=0), PlainTorch(seed=1)
    for step in range(3):
        one_update(generator, step)
        plain_generator.step(step)
        score.couple(generator, 0.9)
        with torch.no_grad():
            for p, q in zip(plain.module.parameters(), plain_generator.module.parameters(), strict=True):
                p.lerp_(q, 0.1)
        assert_equal_weights(score, plain.module)
        one_update(score, 20 + step)
        plain.step(20 + step)
    assert_equal_weights(score, plain.module)
    assert_equal_weights(generator, plain_generator.module)


def check_n_couplings(kind: str, directory: Path) -> None:
    score, generator = engine(kind, seed=0), engine(kind, seed=1)
    start, target = score.weights(), generator.weights()
    for _ in range(10):
        score.couple(generator, 0.9)
    for name, got in score.weights().items():
        expected = 0.9**10 * start[name].double() + (1 - 0.9**10) * target[name].double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def check_uneven_shards(kind: str, directory: Path) -> None:
    """6 and 2 samples: the mean over all 8, not the mean of the two ranks' means."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        mine = batch(step).split([6, 2])[torch.distributed.get_rank()]
        trained.backward(trained.shard_weight(len(mine)) * mean_loss(trained, mine))
        trained.update()
        plain.step(step)
    assert_equal_weights(trained, plain.module)
    assert trained.shard_weight(4) == 1.0


def check_shards_padded_with_weight_zero(kind: str, directory: Path) -> None:
    """5 samples padded to 8: every rank makes the same calls, padding counts for nothing, the loss is normalised by the global count."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        weights = (torch.arange(BATCH) < 5).float()
        losses = (trained(shard(batch(step)))).square().mean(1)
        ranks = torch.distributed.get_world_size()
        trained.backward(ranks * (losses * shard(weights)).sum() / 5)
        trained.update()
        plain.module(batch(step)[:5]).square().mean().backward()
        plain.update()
    assert_equal_weights(trained, plain.module)


def check_not_finite_on_one_rank_stops_all(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, clip=0.1), PlainTorch(clip=0.1)
    one_update(trained, 0)
    plain.step(0)
    before = trained.state()
    bad = torch.distributed.get_rank() == 1
    for what, poison in (
        ("loss", lambda y: y.mean() + float("nan")),
        ("gradient", lambda y: (y * 0).square().sqrt().sum()),
    ):
        output = trained(shard(batch(1)))
        trained.backward(poison(output) if bad else output.mean())
        with pytest.raises(FloatingPointError, match=f"generator: the {what} of distillation update 2 is not finite"):
            trained.update()
        assert_same(trained.state(), before)
    one_update(trained, 2)
    plain.step(2)
    assert_equal_weights(trained, plain.module)


def check_ranks_start_from_the_weights_of_rank_0(kind: str, directory: Path) -> None:
    trained = engine(kind, seed=torch.distributed.get_rank())
    assert_equal_weights(trained, network(0), tolerance=0.0)
    one_update(trained, 0)
    plain = PlainTorch(seed=0)
    plain.step(0)
    assert_equal_weights(trained, plain.module)


def check_gradients_through_the_network_to_its_inputs(kind: str, directory: Path) -> None:
    """A critic's gradient with respect to its inputs leaves nothing behind in the critic."""
    trained, plain = engine(kind), PlainTorch()
    x = shard(batch(0)).requires_grad_()
    torch.autograd.grad(trained.module(x).sum(), x)
    one_update(trained, 1)
    plain.step(1)
    assert_equal_weights(trained, plain.module)


def check_copies_of_the_module_are_independent(kind: str, directory: Path) -> None:
    """The frozen reference policy is a deep copy of the trained network."""
    trained = engine(kind)
    one_update(trained, 0)
    reference = copy.deepcopy(trained.module).eval().requires_grad_(False)
    plain = PlainTorch()
    plain.step(0)
    torch.testing.assert_close(reference(batch(1)), plain.module(batch(1)))
    with torch.no_grad():
        trained.module(batch(1)), reference(batch(1))
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    one_update(trained, 1)
    assert_same(dict(reference.state_dict()), expected)
    assert not torch.equal(reference(batch(1)), trained.module(batch(1)))


def history(trained: Engine, steps: range) -> None:
    for step in steps:
        one_update(trained, step)
        one_update(trained, 50 + step, "preference", lr=1e-3)


def check_resume_is_bit_for_bit(kind: str, directory: Path) -> None:
    straight, resumed = engine(kind, clip=0.1, warmup=4), engine(kind, seed=5, clip=0.1, warmup=4)
    one_update(resumed, 9, "forgotten")
    history(straight, range(3))
    state = straight.state()
    if torch.distributed.get_rank() == 0:
        save_tensors(directory / f"{kind}.safetensors", state)  # the single rank of the second launch reads it too
    torch.distributed.barrier()
    resumed.load_state(load_tensors(directory / f"{kind}.safetensors"))
    for trained in (straight, resumed):
        history(trained, range(3, 6))
    assert_same(resumed.state(), straight.state())
    rank = torch.distributed.get_rank()
    (directory / f"{kind}-{rank}.json").write_text(json.dumps({k: v.double().sum().item() for k, v in state.items()}))
    torch.distributed.barrier()
    assert len({(directory / f"{kind}-{r}.json").read_text() for r in range(2)}) == 1, "ranks disagree about the state"


def check_engines_agree_and_exchange_states(kind: str, directory: Path) -> None:
    """The same history through both engines; then each continues from the other's state."""
    here, there = (engine(k, clip=0.1, warmup=4) for k in (kind, KINDS[1 - KINDS.index(kind)]))
    for trained in (here, there):
        history(trained, range(3))
    for name, value in here.state().items():
        torch.testing.assert_close(value, there.state()[name], rtol=1e-6, atol=1e-8)
    there.load_state(here.state())
    assert_same(there.state(), here.state())
    for trained in (here, there):
        history(trained, range(3, 6))
    for name, value in here.state().items():
        torch.testing.assert_close(value, there.state()[name], rtol=1e-6, atol=1e-8)


# ---- checks in one rank


def check_one_rank_continues_what_two_saved(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, seed=5, clip=0.1, warmup=4), PlainTorch(clip=0.1)
    trained.load_state(load_tensors(directory / f"{kind}.safetensors"))
    assert (trained.updates(), trained.updates("preference")) == (3, 3)
    history(trained, range(3, 6))
    for step in range(6):
        plain.step(step, lr=LR * min(1, (step + 1) / 4))
        plain.step(50 + step, "preference", lr=1e-3 * min(1, (step + 1) / 4))
    assert_equal_weights(trained, plain.module, tolerance=1e-5)


def check_engines_are_bit_identical_in_one_rank(kind: str, directory: Path) -> None:
    """Clipping active, two objectives, warm-up, coupling, a refused update, a resume."""
    trained = {k: engine(k, clip=0.1, warmup=3) for k in KINDS}
    coupled = {k: engine(k, seed=1, role="score estimator") for k in KINDS}
    for step in range(4):
        norms = {k: one_update(trained[k], step) for k in KINDS}
        assert norms["torch"] == norms["deepspeed"]
        for k in KINDS:
            one_update(trained[k], 60 + step, "preference", lr=1e-3)
            coupled[k].couple(trained[k], 0.9)
            one_update(coupled[k], step)
            trained[k].backward(trained[k](batch(step)).mean() * float("inf"))
            with pytest.raises(FloatingPointError):
                trained[k].update()
    for engines in (trained, coupled):
        assert_same(engines["torch"].state(), engines["deepspeed"].state())
        assert_same(dict(engines["torch"].module.state_dict()), dict(engines["deepspeed"].module.state_dict()))
    with pytest.raises(ValueError, match="cannot be coupled"):
        coupled["torch"].couple(trained["deepspeed"], 0.9)


TWO_RANKS = (
    check_mean_over_ranks,
    check_objectives_keep_their_own_moments,
    check_two_gradients_through_one_backward_of_a_sum,
    check_second_backward_is_refused,
    check_clipping,
    check_warm_up,
    check_coupling_reaches_the_masters,
    check_n_couplings,
    check_uneven_shards,
    check_shards_padded_with_weight_zero,
    check_not_finite_on_one_rank_stops_all,
    check_ranks_start_from_the_weights_of_rank_0,
    check_gradients_through_the_network_to_its_inputs,
    check_copies_of_the_module_are_independent,
    check_resume_is_bit_for_bit,
    check_engines_agree_and_exchange_states,
)
ONE_RANK = (check_one_rank_continues_what_two_saved, check_engines_are_bit_identical_in_one_rank)


# ---- launching


def run_rank(rank: int, world_size: int, port: int, directory: Path) -> None:
    """Run the checks in this process; write {"check[kind]": traceback or ""}."""
    torch.set_num_threads(1)
    if world_size > 1:  # a single DeepSpeed rank makes a group of its own
        init_process_group(rank, world_size, port=port, timeout_s=300)
    results = {}
    for check in TWO_RANKS if world_size > 1 else ONE_RANK:
        for kind in KINDS:
            try:
                check(kind, directory)
                results[f"{check.__name__}[{kind}]"] = ""
            except BaseException:
                results[f"{check.__name__}[{kind}]"] = traceback.format_exc()
                if world_size > 1:  # the other rank may now wait for us in a collective: its timeout ends it
                    break
    (directory / f"results-{world_size}-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def launch(world_size: int, directory: Path) -> tuple[dict[str, list[str]], str]:
    """All ranks' results by check, and everything they printed. Kills ranks that outlive the deadline."""
    port = free_port()
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(port), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        printed = "".join(process.communicate(timeout=DEADLINE_S)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results: dict[str, list[str]] = {}
    for rank in range(world_size):
        file = directory / f"results-{world_size}-{rank}.json"
        assert file.exists(), f"rank {rank} of {world_size} ended without results:\n{printed}"
        for name, outcome in json.loads(file.read_text()).items():
            results.setdefault(name, []).append(outcome)
    return results, printed


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, list[str]], str]]:
    directory = tmp_path_factory.mktemp("ranks")
    return {world_size: launch(world_size, directory) for world_size in (2, 1)}


@pytest.mark.timeout(2 * DEADLINE_S + 30)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world_size", "check"),
    [*((2, check.__name__) for check in TWO_RANKS), *((1, check.__name__) for check in ONE_RANK)],
)
def test_against_plain_torch(launches, world_size, check, kind):
    outcomes = launches[world_size][0].get(f"{check}[{kind}]", ["did not run: an earlier check failed"])
    assert outcomes == [""] * world_size, "\n".join(outcomes)


@pytest.mark.timeout(2 * DEADLINE_S + 30)
@pytest.mark.parametrize("world_size", [2, 1])
def test_deepspeed_prints_nothing(launches, world_size):
    assert launches[world_size][1] == ""


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
