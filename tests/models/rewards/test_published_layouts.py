"""Loaders against the published checkpoints: every name and shape of them, on the meta device, without a byte of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig

from flashdmd_ray.catalog import published
from flashdmd_ray.models.rewards import imagereward, mps
from flashdmd_ray.models.rewards.clip import clip_of
from flashdmd_ray.models.rewards.heads import LinearHead
from flashdmd_ray.models.state_dicts import assemble
from tests.models.rewards.record_layouts import FILE, read, state_of

FLOAT = torch.float32
State = Mapping[str, Tensor]


def clip_config(model: published.Model) -> CLIPConfig:
    return CLIPConfig(**{key: value for key, value in model.config.items() if key != "architectures"})


def hpsv2(state: State) -> nn.Module:
    return assemble(lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), state, "hpsv2", FLOAT)


LOADERS: dict[str, Callable[[State], Any]] = {
    "pickscore": lambda state: clip_of(state, clip_config(published.PICKSCORE), "it", FLOAT),
    "clipscore": lambda state: clip_of(state, clip_config(published.CLIP_LARGE), "it", FLOAT),
    "hpsv2": hpsv2,
    "imagereward": lambda state: imagereward.modules_of(state, {}, "it", FLOAT),
    "aesthetic": lambda state: assemble(lambda: LinearHead(768), state, "it", FLOAT),
    "mps": lambda state: mps.modules_of(state, clip_config(published.PICKSCORE), "it", FLOAT),
}
COUNTED = {"hpsv2": 686, "aesthetic": 10}
"""Keys that were counted in the published files themselves."""


@pytest.fixture(scope="module")
def layouts() -> dict[str, dict[str, list[int]]]:
    assert FILE.stat().st_size < 100_000
    return read()


@pytest.mark.parametrize("kind", list(LOADERS))
def test_the_loader_takes_exactly_the_published_layout(kind, layouts):
    assert len(layouts[kind]) == COUNTED.get(kind, len(layouts[kind]))
    loaded = LOADERS[kind](state_of(layouts[kind]))
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) > 900_000


@pytest.mark.parametrize("kind", list(LOADERS))
def test_and_nothing_else(kind, layouts):
    state = state_of(layouts[kind])
    needed = [name for name in state if name.endswith(".weight") and "_proj.weight" not in name.removeprefix("blip.")]
    first, last = needed[0], needed[-1]
    with pytest.raises(ValueError, match="lacks"):
        LOADERS[kind]({name: value for name, value in state.items() if name != first})
    with pytest.raises(ValueError, match="unknown weight"):
        LOADERS[kind](state | {f"{last}.other": torch.empty(1, device="meta")})
    with pytest.raises(ValueError, match="the model needs"):
        LOADERS[kind](state | {last: torch.empty(1, 2, 3, device="meta")})
