"""Each reward against an independent reference: the stock model where there is one, else the published equations written out again."""

from __future__ import annotations

import math
import sys

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection

from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.rewards.mps import CONDITION
from flashdmd_ray.models.rewards.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    LongestEdgePreprocessing,
    TorchvisionPreprocessing,
)
from tests.models.rewards.small_rewards import (
    OPEN_CLIP,
    SIDE,
    TEXTS,
    bytes_as_images,
    noise_bytes,
    photos,
    small_reward,
)

BYTE = 1.1 / 255 / min(CLIP_STD)
"""What rounding to 8 bits after resizing can change, in normalised units."""


def pictures(pixels):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def at_own_size():
    """At the processor's own size nothing is resampled, so that any image must be read alike."""
    pixels = noise_bytes(len(TEXTS), SIDE, SIDE)
    return pixels, bytes_as_images(pixels)


def clip_logits(path, pixels):
    processor, clip = CLIPProcessor.from_pretrained(path), CLIPModel.from_pretrained(path)
    inputs = processor(
        text=TEXTS, images=list(pixels), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        return clip(**inputs).logits_per_image.diagonal(), clip.logit_scale.exp()


def test_pickscore_is_clips_logit(tmp_path):
    pixels, images = at_own_size()
    reward = small_reward("pickscore", tmp_path)
    expected, _ = clip_logits(tmp_path, pixels)
    torch.testing.assert_close(reward.score(images, TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01, "the test must tell images apart"


@pytest.mark.parametrize("sign", [1, -1])
def test_clipscore_is_a_hundred_cosines_where_they_are_positive(sign, tmp_path):
    pixels, images = at_own_size()
    reward = small_reward("clipscore", tmp_path)
    reward.clip.visual_projection.weight.mul_(sign)
    logits, scale = clip_logits(tmp_path, pixels)
    expected = (sign * 100 * logits / scale).clamp(min=0)
    torch.testing.assert_close(reward.score(images, TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert (expected > 0).all() or (expected == 0).all(), "one sign shows the cosine, the other the cut"


@pytest.mark.parametrize("kind", ["hpsv2", "hpsv2.1"])
def test_hpsv2_is_open_clips_cosine(kind, tmp_path):
    pixels, images = at_own_size()
    reward = small_reward(kind, tmp_path)
    clip = open_clip.CLIP(**OPEN_CLIP).eval()
    clip.load_state_dict(load_file(tmp_path / "open_clip_model.safetensors"))
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest")
    with torch.no_grad():
        image, text, _ = clip(
            torch.stack([transform(picture) for picture in pictures(pixels)]),
            open_clip.SimpleTokenizer(context_length=12)(TEXTS),
        )
    torch.testing.assert_close(reward.score(images, TEXTS), (image * text).sum(-1), rtol=1e-5, atol=1e-5)
    assert reward.name == kind


def test_without_open_clip_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as Python marks what cannot be imported
    with pytest.raises(ValueError, match=r"kind 'hpsv2' need open_clip: pip install 'flashdmd-ray\[rewards\]'$"):
        build_reward("hpsv2", str(tmp_path))


def test_aesthetic_is_one_linear_map(tmp_path):
    """Five linear layers in a row are one: w x + b, here in float64."""
    pixels, images = at_own_size()
    reward = small_reward("aesthetic", tmp_path)
    state = torch.load(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    w, b = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for place in (0, 2, 4, 6, 7):
        weight = state[f"layers.{place}.weight"].double()
        w, b = weight @ w, weight @ b + state[f"layers.{place}.bias"].double()
    vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    inputs = CLIPProcessor.from_pretrained(tmp_path)(images=list(pixels), return_tensors="pt")
    with torch.no_grad():
        seen = F.normalize(vision(inputs.pixel_values).image_embeds.double(), dim=-1)
    torch.testing.assert_close(reward.score(images, TEXTS).double(), seen @ w[0] + b, rtol=1e-4, atol=1e-4)


def test_imagereward_is_blip_written_out(tmp_path):
    pixels, images = at_own_size()
    reward = small_reward("imagereward", tmp_path)
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    words = BertTokenizer.from_pretrained(tmp_path)
    normalised = (pixels / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    expected = []
    for image, text in zip(normalised, TEXTS, strict=True):
        ids = words(text, truncation=True, max_length=35).input_ids  # no padding: masked out, it must change nothing
        expected.append(_blip(state, image[None], torch.tensor([ids])))
    torch.testing.assert_close(reward.score(images, TEXTS), torch.stack(expected), rtol=1e-4, atol=1e-4)


def _norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def _blip(state, image, ids):
    """One image and one prompt, post-norm BERT with cross-attention over a pre-norm ViT, on the published names."""
    v = "blip.visual_encoder"
    patches = F.conv2d(image, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], stride=4)
    x = torch.cat([state[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{v}.pos_embed"][0]
    for block in (f"{v}.blocks.0", f"{v}.blocks.1"):
        q, k, value = _linear(_norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, -1)
        x = x + _linear(_attention(q, k, value, 2), state, f"{block}.attn.proj")
        hidden = F.gelu(_linear(_norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + _linear(hidden, state, f"{block}.mlp.fc2")
    seen = _norm(x, state, f"{v}.norm", 1e-6)
    t = "blip.text_encoder"
    y = state[f"{t}.embeddings.word_embeddings.weight"][ids[0]]
    y = y + state[f"{t}.embeddings.position_embeddings.weight"][: len(y)]
    y = _norm(y, state, f"{t}.embeddings.LayerNorm", 1e-12)
    for layer in (f"{t}.encoder.layer.0", f"{t}.encoder.layer.1"):
        for kind, source in (("attention", None), ("crossattention", seen)):
            given = y if source is None else source
            q = _linear(y, state, f"{layer}.{kind}.self.query")
            k, value = (_linear(given, state, f"{layer}.{kind}.self.{part}") for part in ("key", "value"))
            read = _linear(_attention(q, k, value, 3), state, f"{layer}.{kind}.output.dense")
            y = _norm(y + read, state, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        hidden = F.gelu(_linear(y, state, f"{layer}.intermediate.dense"))
        y = _norm(y + _linear(hidden, state, f"{layer}.output.dense"), state, f"{layer}.output.LayerNorm", 1e-12)
    cls = y[0]
    for place in (0, 2, 4, 6, 7):
        cls = _linear(cls, state, f"mlp.layers.{place}")
    return (cls[0] - 0.16717362830052426) / 1.0333394966054072


def test_mps_is_its_cross_model_written_out(tmp_path):
    pixels, images = at_own_size()
    reward = small_reward("mps", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    clip = CLIPModel(reward.clip.config).eval()
    names = [name for name in state if name.startswith("model.") and "position_ids" not in name]
    clip.load_state_dict({name.removeprefix("model."): state[name] for name in names})
    processor = CLIPProcessor.from_pretrained(tmp_path)
    inputs = processor(
        text=[*TEXTS, CONDITION],
        images=list(pixels),
        padding="max_length",
        truncation=True,
        max_length=12,
        return_tensors="pt",
    )
    with torch.no_grad():
        read = clip.text_model(input_ids=inputs.input_ids)
        words, ends = clip.text_projection(read.last_hidden_state), clip.text_projection(read.pooler_output)
        seen = clip.visual_projection(clip.vision_model(pixel_values=inputs.pixel_values).last_hidden_state)
        shares, expected = [], []
        for row in range(len(TEXTS)):
            similar = (words[row] @ words[-1].T).max(dim=1).values
            asked = similar / similar.max() > 0.3
            shares.append(asked.float().mean().item())
            image = _cross(state, seen[row], words[row], asked)
            expected.append(clip.logit_scale.exp() * F.cosine_similarity(ends[row], image, dim=0))
    assert min(shares) < 1, "some words must be masked for the mask to be tested"
    torch.testing.assert_close(reward.score(images, TEXTS), torch.stack(expected), rtol=1e-4, atol=1e-4)


def _cross(state, x, words, asked):
    """Queries of 2 heads of 64 over one key and value; the last block's rotary positions as complex numbers."""

    def attend(q, k, v, mask):
        q = q.unflatten(-1, (2, 64)).transpose(0, 1)
        return ((q @ k.T / 8 + mask).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def rotate(x):
        angles = torch.outer(torch.arange(float(x.shape[-2])), 10000.0 ** (-torch.arange(32) / 32))
        turned = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def gated(x):
        x, gate = x.chunk(2, -1)
        return F.silu(gate) * x

    mask = torch.where(asked, 0.0, float("-inf"))
    for layer in range(4):
        w = {
            n.removeprefix(f"cross_model.layers.{layer}."): v
            for n, v in state.items()
            if f".layers.{layer}." in n and "cross" in n
        }
        normed = F.layer_norm(x, (128,), w["0.fn.norm.weight"])
        k, v = (words @ w["0.fn.to_kv.weight"].T).chunk(2, -1)
        read = attend(normed @ w["0.fn.to_q.weight"].T, k, v, mask) @ w["0.fn.to_out.weight"].T
        x = x + read + gated(normed @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T
        fused = F.layer_norm(x, (128,), w["1.fn.norm.weight"]) @ w["1.fn.fused_attn_ff_proj.weight"].T
        q, k, v, wide = fused.split((128, 64, 64, 1024), -1)
        q = rotate(q.unflatten(-1, (2, 64)).transpose(0, 1)).transpose(0, 1).flatten(1)
        read = attend(q, rotate(k), v, torch.tensor(0.0)) @ w["1.fn.attn_out.weight"].T
        x = x + read + gated(wide) @ w["1.fn.ff_out.1.weight"].T
    return x[0]


@pytest.mark.parametrize("shape", [(24, 24), (40, 31), (31, 40), (12, 20), (8, 9), (16, 16)])
def test_longest_edge_and_padding_are_those_of_open_clip(shape):
    pixels = photos(2, *shape)
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest")
    expected = torch.stack([transform(picture) for picture in pictures(pixels)])
    ours = LongestEdgePreprocessing(SIDE)(bytes_as_images(pixels))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < BYTE


@pytest.mark.parametrize("shape", [(24, 24), (40, 31), (31, 40), (12, 20), (17, 33)])
def test_shortest_edge_and_crop_are_those_of_torchvision(shape):
    pixels = photos(2, *shape)
    steps = [Resize(SIDE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor()]
    transform = Compose([*steps, Normalize(CLIP_MEAN, CLIP_STD)])
    expected = torch.stack([transform(picture) for picture in pictures(pixels)])
    ours = TorchvisionPreprocessing(SIDE, (SIDE, SIDE))(bytes_as_images(pixels))
    assert (ours - expected).abs().max() < BYTE
