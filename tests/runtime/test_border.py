"""The border between the driver's CPU tensors and roles on another device."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdmd_ray.batch import Latents, Prompts, move
from flashdmd_ray.runtime.border import RoleHere, call_role
from flashdmd_ray.runtime.call_times import CallTimes

META = torch.device("meta")  # a device every machine has; its tensors have shapes and no values


class Elsewhere:
    """A role that records where its arguments lie."""

    device = META

    def __init__(self) -> None:
        self.seen: list[torch.device] = []

    def judge(self, latents: Latents, timesteps: Tensor, seed: int, extra: Tensor | None = None) -> dict[str, float]:
        self.seen += [latents.values.device, latents.prompts.indices.device, timesteps.device]
        self.seen += [] if extra is None else [extra.device]
        return {"seed": float(seed)}

    def ema_update_from(self, neighbour: object) -> object:
        return type(neighbour).__name__


class Here:
    def double(self, x: Tensor) -> Tensor:
        return 2 * x


def here(role: object) -> RoleHere:
    return RoleHere("learner", "generator", role, CallTimes())


def latents() -> Latents:
    return Latents(torch.zeros(2, 3), Prompts(("a", "b"), torch.arange(2)))


def test_arguments_reach_a_role_on_its_device_and_everything_else_as_it_is() -> None:
    role = Elsewhere()
    assert here(role).judge(latents(), torch.arange(2), 7, extra=torch.ones(1)) == {"seed": 7.0}
    assert role.seen == [META] * 4


def test_a_neighbour_is_handed_over_as_itself() -> None:
    assert here(Elsewhere()).ema_update_from(here(Elsewhere())) == "Elsewhere"


def test_calls_are_timed_and_other_attributes_read() -> None:
    role, times = Elsewhere(), CallTimes()
    handle = RoleHere("learner", "generator", role, times)
    assert handle.seen is role.seen
    for _ in range(2):
        handle.ema_update_from(role)
    took = times.take()
    assert list(took.seconds) == ["generator/ema_update_from"]
    assert took.busy["learner"] == took.seconds["generator/ema_update_from"] > 0
    assert 2**20 < took.memory["learner"] < 2**40, "bytes"
    assert not times.take().seconds
    reply = call_role(Here(), "double", (torch.ones(2),), {})
    assert reply.result.tolist() == [2.0, 2.0]
    assert reply.spent[0].trace == b""


def test_move_reaches_into_batches_mappings_lists_and_tuples() -> None:
    moved = move({"batch": latents(), "rest": [(torch.ones(1), "text")], "number": 3}, META)
    assert moved["batch"].values.device == moved["batch"].prompts.indices.device == moved["rest"][0][0].device == META
    assert moved["batch"].prompts.texts == ("a", "b")
    assert moved["rest"][0][1] == "text"
    assert moved["number"] == 3
