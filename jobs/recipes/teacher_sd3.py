"""Second teacher: an SD3-form flow transformer on the first one's text towers and VAE, saved as StableDiffusion3Pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.demo.scenes import CANVAS, make_pool, sample_scenes
from recipes import teacher
from recipes.text import MAX_LENGTH, normalise_pooled, tokenize
from recipes.training import Plan, fit
from recipes.vae import LATENT_CHANNELS

PLAN = Plan(steps=12000, learning_rate=1.5e-3, warmup=300, ema_decay=0.999, seed=81)
BATCH = 64
CONDITION_DROPOUT = 0.1
GUIDANCE = 2.0
SHIFT = 2.0
PATCH = 2
# Wider than the two towers side by side, as in SD3: the pipelines fill the rest with zeros.
JOINT_WIDTH = 192
# Without a T5 the stock pipeline appends max_sequence_length rows of zeros to the text, 256 unless told otherwise.
T5_LENGTHS = (MAX_LENGTH, 256)
_POOL = 60_000


def build_transformer(
    pooled_width: int, *, layers: int = 4, heads: int = 5, head_width: int = 16
) -> SD3Transformer2DModel:
    """MMDiT on 12x12x3 latents. Every block starts as the identity (zero gates), without which small ones train slowly."""
    width = heads * head_width
    transformer = SD3Transformer2DModel(
        sample_size=CANVAS // 2,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=CANVAS // 2 // PATCH,
        qk_norm="rms_norm",
    )
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def with_projection(tower: CLIPTextModel, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModelWithProjection:
    """SDXL's first tower as SD3 wants it: the same weights and a random rotation of the pooled state.

    It is scaled to pooled embeddings of unit mean square, the size that the transformer's layers expect.
    """
    config = CLIPTextConfig.from_dict({**tower.config.to_dict(), "projection_dim": tower.config.hidden_size})
    projected = CLIPTextModelWithProjection(config).eval()
    projected.text_model.load_state_dict(tower.state_dict())
    with torch.no_grad():
        random = torch.randn(projected.text_projection.weight.shape, generator=torch.Generator().manual_seed(seed))
        projected.text_projection.weight.copy_(torch.linalg.qr(random).Q)
    captions = [scene.caption for scene in sample_scenes(4096, "train", seed)]
    normalise_pooled(projected, tokenize(tokenizer, captions))
    return projected


@torch.no_grad()
def encode_text(
    one: CLIPTextModelWithProjection, two: CLIPTextModelWithProjection, ids: Tensor, t5_length: int
) -> tuple[Tensor, Tensor]:
    """Text embeddings of the stock pipeline without a T5: states (B, L + t5_length, JOINT_WIDTH) and pooled (B, P1 + P2).

    Penultimate states of both towers side by side, filled up with zeros to the right and then below.
    """
    first, second = (tower(input_ids=ids, output_hidden_states=True) for tower in (one, two))
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    states = F.pad(states, (0, JOINT_WIDTH - states.shape[-1], 0, t5_length))
    return states, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


class LastTokenCounts:
    """Joint attention in which the text's last token stands for several equal ones.

    Tokens of the text have no position, so n equal ones stay equal in every block, and as keys they weigh like one whose
    logit is larger by log n. With log n as the mask's last column (and 0 elsewhere) one token gives what n would, at
    the cost of one.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image (B, N, D) and text (B, L, D), mask (B, 1, 1, N + L) added to the logits."""

        def split_heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [attn.norm_q(split_heads(attn.to_q(image))), attn.norm_added_q(split_heads(attn.add_q_proj(text)))], dim=2
        )
        key = torch.cat(
            [attn.norm_k(split_heads(attn.to_k(image))), attn.norm_added_k(split_heads(attn.add_k_proj(text)))], dim=2
        )
        value = torch.cat([split_heads(attn.to_v(image)), split_heads(attn.add_v_proj(text))], dim=2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        image, text = mixed.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def last_token_mask(counts: Tensor, tokens: int) -> Tensor:
    """Mask (B, 1, 1, tokens) for `LastTokenCounts`: the last of `tokens` counts `counts` (B,) times."""
    mask = torch.zeros(len(counts), 1, 1, tokens)
    mask[..., -1] = counts.log()[:, None, None]
    return mask


def train(
    work: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    one: CLIPTextModelWithProjection,
    two: CLIPTextModelWithProjection,
    plan: Plan = PLAN,
) -> tuple[SD3Transformer2DModel, dict[str, float]]:
    """Velocity matching on noise levels uniform in the scheduler's grid; one caption in ten is the empty one.

    The number of the T5's zeros is drawn for each example, so that any length in T5_LENGTHS is as good as another.
    """
    torch.manual_seed(plan.seed)
    transformer = build_transformer(one.config.projection_dim + two.config.projection_dim)
    stock = transformer.attn_processors
    transformer.set_attn_processor(LastTokenCounts())
    pool = make_pool(_POOL, "train", plan.seed)
    latents = torch.cat([teacher.encode_images(vae, pool.batch(i)) for i in torch.arange(_POOL).split(2048)])
    ids = tokenize(tokenizer, pool.captions)
    empty = tokenize(tokenizer, [""])
    tokens = (latents.shape[-1] // PATCH) ** 2 + MAX_LENGTH + 1
    shortest, longest = (math.log(length) for length in T5_LENGTHS)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        # one noise level per stratum of the batch: less variance in the loss than independent draws
        uniform = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        level = sigma[:, None, None, None]
        dropped = torch.rand(BATCH, 1, generator=generator) < CONDITION_DROPOUT
        states, pooled = encode_text(one, two, torch.where(dropped, empty, ids[index]), 1)
        counts = (shortest + (longest - shortest) * torch.rand(BATCH, generator=generator)).exp()
        output = transformer(
            hidden_states=(1 - level) * clean + level * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            joint_attention_kwargs={"attention_mask": last_token_mask(counts, tokens)},
        ).sample
        return (output - (noise - clean)).square().mean()

    seconds = fit("teacher_sd3", transformer, loss_of, plan, work)
    transformer.set_attn_processor(stock)
    return transformer.eval(), {"seconds": seconds}


def build_pipeline(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    one: CLIPTextModelWithProjection,
    two: CLIPTextModelWithProjection,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """The stock pipeline without a T5. It reads a shift of the latents, which is 0, from the VAE's configuration."""
    vae.register_to_config(shift_factor=0.0, _name_or_path="")  # where the VAE was loaded from says nothing elsewhere
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=one,
        text_encoder_2=two,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def load(path: Path) -> StableDiffusion3Pipeline:
    """The saved directory in single precision. diffusers wants to be told that there is no T5."""
    return StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)


def report(pipeline: StableDiffusion3Pipeline, checker: PromptChecker, count: int = 2000) -> dict[str, float]:
    """`teacher.report` at the shortest T5 length, and the prompt accuracy at the longest (the pipeline's default)."""
    shortest, longest = T5_LENGTHS
    figures = teacher.report(pipeline, checker, count, guided=GUIDANCE, max_sequence_length=shortest)
    some = max(1, count // 10)
    accuracy, _ = teacher.evaluate(
        pipeline, checker, some, steps=25, guidance=GUIDANCE, seed=0, max_sequence_length=longest
    )
    return figures | {f"t5_length_{longest}_accuracy": accuracy, f"t5_length_{longest}_count": some}
