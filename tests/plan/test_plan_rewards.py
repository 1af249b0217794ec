"""Plans of rewards: sizes of the published ones, operations against a counter, and what is said of rewards that nobody can know."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashdmd_ray import plan
from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.rewards import REWARDS
from flashdmd_ray.config import parse_config
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.plan.clip import reward_use
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import Model, models_of
from flashdmd_ray.plan.parts import parts_of
from flashdmd_ray.plan.text import describe
from tests.models.rewards.record_layouts import FILE
from tests.models.rewards.small_rewards import SIDE, small_reward

NOT_LOADED = re.compile(
    r"position_ids$|\.inv_freq$|\.fn\.norm\.bias$|^blip\.(vision|text)_proj\.|^up_blocks|^conv_norm_out|^conv_out"
)


def parameters(layout: dict[str, list[int]]) -> int:
    return sum(math.prod(shape) for name, shape in layout.items() if not NOT_LOADED.search(name))


def test_sizes_of_published_rewards_are_those_of_their_checkpoints():
    layouts = json.loads(gzip.decompress(FILE.read_bytes()))
    for kind in ("hpsv2", "imagereward", "mps"):
        model = REWARDS[kind].model
        assert model is not None
        assert model.parameters == parameters(layouts[kind])
    vision = parameters(
        {n: s for n, s in layouts["clipscore"].items() if n.startswith(("vision_model", "visual_projection"))}
    )
    assert published.AESTHETIC.parameters == vision + parameters(layouts["aesthetic"])
    texts = {"sdxl": published.CLIP_L.parameters + published.CLIP_BIG_G.parameters, "sd15": published.CLIP_L.parameters}
    for family, encoders in texts.items():
        layout = layouts[f"lrm_{family}"]
        count = parameters(layout["unet"]) + parameters(layout["state_dict.pt"]) + encoders
        assert published.LATENT_REWARDS[f"casiatao/LRM/lrm_{family}"].parameters == count


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 4}
WORDS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 12}
CONFIGS = {
    "pickscore": {"vision_config": SMALL, "text_config": WORDS},
    "aesthetic": {"vision_config": SMALL},
    "imagereward": {
        "vision_config": {**SMALL, "hidden_size": 128, "intermediate_size": 96},
        "text_config": {
            **WORDS,
            "hidden_size": 24,
            "intermediate_size": 48,
            "max_position_embeddings": 35,
            "encoder_hidden_size": 128,
        },
    },
    "mps": {
        "vision_config": {**SMALL, "hidden_size": 64, "intermediate_size": 128},
        "text_config": {**WORDS, "hidden_size": 64, "intermediate_size": 128},
        "projection_dim": 128,
        "cross_layers": 4,
    },
}
HEAD = 2 * (1024 * 128 + 128 * 64 + 64 * 16 + 16)
"""Operations of a linear head after its first layer: beside a published tower nothing, beside a small one a lot."""


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_operations_are_those_that_a_counter_sees(kind, tmp_path):
    reward = small_reward(kind, tmp_path)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reward.score(torch.zeros(2, 3, SIDE, SIDE), ["a", "b"])
    use = reward_use(kind, Model("small", CONFIGS[kind]), (SIDE, SIDE))
    assert use is not None
    heads = {"aesthetic": 2 * (HEAD + 2 * 8 * 1024), "imagereward": 2 * (HEAD + 2 * 24 * 1024)}
    assert use.flops(2) + heads.get(kind, 0) == pytest.approx(counter.get_total_flops(), rel=0.05)


def configured(tmp_path, *rewards):
    return parse_config({"rewards": [{"kind": "pickscore"}, *rewards], "run": {"dir": str(tmp_path)}})


def test_a_server_takes_nothing_here_and_a_class_of_ones_own_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Mine:\n    def score(self, images, texts): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    remote = {"kind": "remote", "path": "http://127.0.0.1:9/"}
    config = configured(tmp_path, remote, {"kind": "custom", "path": "mine:Mine"})
    run, parts = plan.check(config)
    held = {part.name: part.held for part in parts if part.name.startswith("reward")}
    assert held["reward: remote"].device == 0
    assert held["reward: custom"] is None
    lines = [line.split() for line in describe(config, run, parts).splitlines() if "reward: custom" in line]
    assert lines, "one line for what it is, one for what it costs"
    assert "loading" in lines[0]
    assert lines[1][-1] == "loading"
    with pytest.raises(ValueError, match=r"rewards\.1\.path: there is no module nowhere\.mine; install it"):
        plan.check(configured(tmp_path, {"kind": "custom", "path": "nowhere.mine:Mine"}))


def test_a_token_that_is_not_set_is_missed_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("SET", "x")
    monkeypatch.setenv("RAY_ADDRESS", "")
    for name, variable in (("SET", None), ("UNSET", r"rewards\.1\.remote\.token_env: UNSET is not set")):
        config = configured(tmp_path, {"kind": "remote", "path": "http://127.0.0.1:9/", "remote": {"token_env": name}})
        if variable is None:
            assert reward_files(config)["remote"].total == 0
        else:
            with pytest.raises(ValueError, match=variable):
                reward_files(config)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert reward_files(config), "workers of another cluster have variables of their own"


def test_published_rewards_are_planned_without_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    kinds = {"hpsv2.1": "xswu/HPSv2", "imagereward": "THUDM/ImageReward", "mps": "RE-N-Y/mpsv1"}
    rewards = [{"kind": kind, "path": path, "dtype": "bfloat16"} for kind, path in kinds.items()]
    rewards.append({"kind": "clipscore", "path": "openai/clip-vit-large-patch14"})
    config = configured(tmp_path, *rewards)
    weights = {part.name: part.held for part in parts_of(config)}
    assert weights["reward: hpsv2.1"].device == 2 * 986_109_441
    assert weights["reward: clipscore"].device == 4 * 427_616_513
    works = {work.part: work for work in step_of(config, models_of(config)).works}
    assert works["reward: mps"].flops > works["reward: hpsv2.1"].flops > works["reward: imagereward"].flops > 0


def test_missing_and_damaged_files_are_named(tmp_path):
    def refused(kind: str, path: Path | str, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            reward_files(configured(tmp_path, {"kind": kind, "path": str(path)}))

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("hpsv2.1", empty, r"rewards\.1\.path: .*empty holds none of HPS_v2\.1_compressed\.pt")
    refused("aesthetic", "nowhere.pth", r"rewards\.1\.path: no such directory: 'nowhere\.pth'")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    refused("mps", tmp_path / "cut.safetensors", r"rewards\.1\.path: .*cut\.safetensors is damaged")
    (empty / "HPS_v2.1_compressed.pt").write_bytes(bytes(400))
    found = reward_files(configured(tmp_path, {"kind": "hpsv2.1", "path": str(empty)}))
    assert found["hpsv2.1"].total == 986_109_441
