"""The sizes of published models are those of the stock modules, and a model that is not on this machine is planned from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from segment_anything import sam_model_registry
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from flashdmd_ray import plan
from flashdmd_ray.catalog import published
from flashdmd_ray.config import parse_config
from flashdmd_ray.plan.measure.networks import build_sam

TRANSFORMERS: dict[str, Any] = {
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": (CLIPTextModelWithProjection, CLIPTextConfig),
    "T5EncoderModel": (T5EncoderModel, T5Config),
    "CLIPModel": (CLIPModel, CLIPConfig),
}
DIFFUSERS: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "UNet2DConditionModel": UNet2DConditionModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
}
MODELS = {
    f"{name}/{folder}": model for name, found in published.PIPELINES.items() for folder, model in found.parts.items()
} | dict(published.CLIP_MODELS)


def build(model: published.Model) -> nn.Module:
    settings = dict(model.config)
    if "_class_name" in settings:
        network: nn.Module = DIFFUSERS[settings["_class_name"]].from_config(settings)
        return network
    module, config = TRANSFORMERS[settings.pop("architectures")[0]]
    built: nn.Module = module(config(**settings))
    return built


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_stock_module(name):
    with torch.device("meta"):
        assert MODELS[name].parameters == sum(p.numel() for p in build(MODELS[name]).parameters())


def test_segment_anything_too():
    with torch.device("meta"):
        for name, model in published.SAM.items():
            official = sam_model_registry[name]()
            assert model.parameters == sum(p.numel() for p in official.parameters())
            ours = build_sam(model.config, 1024)
            shapes = {key: value.shape for key, value in official.image_encoder.state_dict().items()}
            assert shapes == {key: value.shape for key, value in ours.state_dict().items()}


def test_what_is_not_here_is_planned_but_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    sam = str(tmp_path / "sam_vit_b_01ec64.pth")
    teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    tree = {"model": {"teacher": teacher, "sam": sam}, "run": {"dir": str(tmp_path), "name": "sdxl"}}
    tree["data"] = {"source": "nowhere"}
    tree["preference"] = {"updates": 0}
    config = parse_config(tree)
    _, parts, missing = plan.preview(config)
    assert {part.name: part.parameters for part in parts}["teacher"] == published.SDXL_UNET.parameters
    assert {part.name: part.parameters for part in parts}["discriminator: SAM"] == 93_735_472
    assert [line.partition(":")[0] for line in missing] == ["model.sam", "data.source"]
    with pytest.raises(ValueError, match=r"model\.sam: .*sam_vit_b_01ec64\.pth does not exist; .* download"):
        plan.check(config)
