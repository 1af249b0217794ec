"""Segment Anything's encoder at other sizes, from both kinds of files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from flashdmd_ray.models.sam import global_attention_tokens, load_sam_encoder, normalise_pixels
from tests.tiny import sam_encoder, save_sam


@pytest.fixture
def checkpoint(tmp_path):
    """An official-style .pth file of a small model."""
    return save_sam(tmp_path / "sam_vit_x.pth")


def test_same_size_gives_the_official_output_frozen(checkpoint) -> None:
    encoder = load_sam_encoder(checkpoint, 32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training
    expected = sam_encoder()(normalise_pixels(images))
    torch.testing.assert_close(encoder(normalise_pixels(images)), expected)
    last = global_attention_tokens(encoder, images)[-1]
    torch.testing.assert_close(encoder.neck(last.permute(0, 3, 1, 2)), expected)


def test_fused_attention_has_the_official_gradient(checkpoint) -> None:
    """To the pixels, in float32 within 1e-5 of the largest; in bfloat16 the output stays within 2 % of the official one's spread."""
    fused, official = load_sam_encoder(checkpoint, 32), sam_encoder()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    direction = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    gradients, outputs = [], []
    for encoder in (fused, official):
        seen = images.clone().requires_grad_()
        outputs.append(encoder(normalise_pixels(seen)))
        gradients += torch.autograd.grad((outputs[-1] * direction).sum(), seen)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()
    half = load_sam_encoder(checkpoint, 32, torch.bfloat16)(normalise_pixels(images).bfloat16()).float()
    assert (half - outputs[1]).square().mean().sqrt() < 0.02 * outputs[1].std()


def test_pixel_normalisation_is_segment_anythings() -> None:
    white = normalise_pixels(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(
        white, torch.tensor([(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375])
    )


@pytest.mark.parametrize("size", [16, 48])
def test_other_sizes_interpolate_absolute_and_relative_tables(checkpoint, size: int) -> None:
    encoder = load_sam_encoder(checkpoint, size)
    grid = size // 4
    assert encoder.pos_embed.shape == (1, grid, grid, 16)
    assert [block.attn.rel_pos_h.shape[0] for block in encoder.blocks] == [5, 2 * grid - 1, 5, 2 * grid - 1]
    levels = global_attention_tokens(encoder, torch.rand(2, 3, size, size) * 2 - 1)
    assert [tuple(level.shape) for level in levels] == [(2, grid, grid, 16)] * 2


def test_interpolation_keeps_a_linear_table_linear(tmp_path) -> None:
    encoder = sam_encoder()
    with torch.no_grad():
        encoder.pos_embed.copy_(torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand(1, 8, 8, 16))
        encoder.blocks[1].attn.rel_pos_w.copy_(torch.linspace(-1, 1, 15)[:, None].expand(15, 8))
    torch.save({f"image_encoder.{n}": v for n, v in encoder.state_dict().items()}, tmp_path / "s.pth")
    larger = load_sam_encoder(tmp_path / "s.pth", 64)
    row = larger.pos_embed[0, 5, 4:-4, 0]  # bicubic interpolation is linear up to a ripple
    torch.testing.assert_close(row.diff(), row.diff().mean().expand(len(row) - 1), atol=0.05, rtol=0)
    table = larger.blocks[1].attn.rel_pos_w[:, 0]
    assert (table.diff() >= 0).all()
    assert table[len(table) // 2].abs() < 1e-6, "distance zero must stay in the middle"


def test_gradient_reaches_the_images(checkpoint) -> None:
    images = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    sum(level.square().mean() for level in global_attention_tokens(load_sam_encoder(checkpoint, 32), images)).backward()
    assert images.grad.abs().sum() > 0


def test_directory_with_safetensors(tmp_path) -> None:
    save_file(
        {f"image_encoder.{n}": v.contiguous() for n, v in sam_encoder().state_dict().items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert load_sam_encoder(tmp_path, 32).img_size == 32


def test_bad_input_is_one_line(tmp_path, checkpoint) -> None:
    with pytest.raises(ValueError, match="multiple of the encoder's patch size 4"):
        load_sam_encoder(checkpoint, 30)
    with pytest.raises(ValueError, match="no such file"):
        load_sam_encoder(tmp_path / "absent.pth", 32)
    (tmp_path / "junk.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no torch file"):
        load_sam_encoder(tmp_path / "junk.pth", 32)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no image encoder"):
        load_sam_encoder(tmp_path / "other.pth", 32)
    with pytest.raises(ValueError, match="loaded for 32"):
        global_attention_tokens(load_sam_encoder(checkpoint, 32), torch.zeros(1, 3, 24, 24))
