"""Heads on frozen Segment Anything features: which gradients exist, and that they may be computed in parts."""

import copy

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch.nn import functional as F

from flashdmd_ray.losses.adversarial import discriminator_loss, generator_loss
from flashdmd_ray.models.discriminator import PixelDiscriminator
from flashdmd_ray.models.sdxl import SDXL
from tests.tiny import save_sdxl


def sam_encoder(size: int = 16) -> ImageEncoderViT:
    """The real Segment Anything encoder, small: windows in blocks 0 and 2, global attention in 1 and 3."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=size,
        patch_size=4,
        embed_dim=16,
        depth=5,
        num_heads=2,
        out_chans=8,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1, 3),
    )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.1)
    return encoder


@pytest.fixture
def discriminator() -> PixelDiscriminator:
    torch.manual_seed(1)
    return PixelDiscriminator(sam_encoder(), hidden=8)


def images(count: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_are_those_of_the_global_attention_blocks(discriminator):
    encoder, seen = sam_encoder(), {}
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda _m, _i, output, index=index: seen.setdefault(index, output))
    x = images()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    encoder(((x * 0.5 + 0.5) * 255 - mean[:, None, None]) / std[:, None, None])
    for level, block in zip(discriminator.features(x), (1, 3), strict=True):
        torch.testing.assert_close(level, seen[block].permute(0, 3, 1, 2))
    assert len(discriminator.features.encoder.blocks) == 4, "blocks after the last level are not computed"


def test_logits_of_all_levels(discriminator):
    logits = discriminator(images())
    assert logits.shape == (3, 2 * 4 * 4)
    assert logits.dtype == torch.float32
    assert discriminator(images(2, size=40)).shape == (2, 32), "other sizes are resized to the encoder's"


def test_a_logit_does_not_depend_on_the_rest_of_the_batch(discriminator):
    discriminator.eval()
    torch.testing.assert_close(discriminator(images())[1:2], discriminator(images()[1:2]))


def test_only_heads_and_pixels_get_gradients(discriminator):
    pixels = images().requires_grad_()
    discriminator.train()
    assert not discriminator.features.encoder.training
    generator_loss(discriminator(pixels), "hinge").backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(p.grad is not None for p in discriminator.heads.parameters())
    assert all(p.grad is None for p in discriminator.features.parameters())
    trained = {name for name, p in discriminator.named_parameters() if p.requires_grad}
    assert trained == {f"heads.{name}" for name, _ in discriminator.heads.named_parameters()}


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = PixelDiscriminator(sam_encoder(), hidden=8, gradient_checkpointing=checkpointing)
        pixels = images().requires_grad_()
        generator_loss(network(pixels), "non_saturating").backward()
        gradients.append(pixels.grad)
    assert torch.equal(*gradients)


def test_heads_learn_to_tell_two_kinds_of_images_apart(discriminator):
    """And the spectral norm of every layer stays 1 while they do."""

    def coarse(seed):
        return F.interpolate(images(8, size=2, seed=1000 + seed), size=(16, 16))

    trained = [p for p in discriminator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.0, 0.99))
    for step in range(80):
        loss = discriminator_loss(discriminator(images(8, seed=step)), discriminator(coarse(step)), "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (discriminator(images(8, seed=500)).mean(dim=1) > 0).all()
        assert (discriminator(coarse(500)).mean(dim=1) < 0).all()
    for head in discriminator.eval().heads:
        weight = head.body[3].weight.flatten(1)
        torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0), rtol=0.05, atol=0)


def test_projection_on_the_prompt():
    torch.manual_seed(1)
    network = PixelDiscriminator(sam_encoder(), hidden=8, prompt_width=6).eval()
    prompts = torch.randn(3, 6)
    x = images()
    base, given = network(x, torch.zeros(3, 6)), network(x, prompts)
    assert (base != given).any(dim=1).all()
    torch.testing.assert_close(
        network(x, -prompts) - base, base - given, rtol=1e-4, atol=1e-5
    )  # linear in the embedding
    with pytest.raises(AssertionError, match="prompt"):
        network(x)


def test_gradients_computed_in_parts_equal_the_monolithic_backward(discriminator, tmp_path):
    """A critic's answer dLoss/dlatents, applied to the generator's kept graph, is the gradient of the whole chain."""
    family = SDXL.from_pretrained(str(save_sdxl(tmp_path / "sdxl")))
    conditioning = family.encode(["a", "b"])
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([249, 249])

    def generate(student):
        return family.schedule.to_x0(student(noisy, t, conditioning), noisy, t)

    whole, critic = family.denoiser(), copy.deepcopy(discriminator)
    generator_loss(critic(family.decode(generate(whole))), "hinge").backward()

    student, critic = family.denoiser(), copy.deepcopy(discriminator)
    kept = generate(student)
    latents = kept.detach().requires_grad_()  # what crosses the process border
    (answer,) = torch.autograd.grad(generator_loss(critic(family.decode(latents)), "hinge"), latents)
    (kept * answer).sum().backward()

    for ours, expected in zip(student.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)
    assert any(p.grad.abs().max() > 0 for p in student.parameters())
