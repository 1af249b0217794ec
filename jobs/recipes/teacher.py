"""Teacher: an SDXL-form U-Net on the frozen text towers and VAE, saved as a StableDiffusionXLPipeline directory."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.demo.scenes import CANVAS, make_pool
from flashdmd_ray.results.evaluation import frechet_distance
from recipes.text import declare_float32, tokenize
from recipes.training import Plan, fit
from recipes.vae import LATENT_CHANNELS

PLAN = Plan(steps=5800, learning_rate=1.2e-3, warmup=200, ema_decay=0.999, seed=31)
BATCH = 64
CONDITION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
GUIDANCE = 2.0
_POOL = 60_000
_TIME_ID_WIDTH = 8


def build_unet(text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """U-Net on 12x12x3 latents; cross-attention to the text at 6x6, as SDXL has none at its highest resolution.

    `attention_head_dim` is the number of heads in this class.
    """
    return UNet2DConditionModel(
        sample_size=CANVAS // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + pooled_width,
    )


def build_scheduler() -> DDIMScheduler:
    """SDXL's noise schedule; "trailing" spacing starts at t = 999, where training ends."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode_text(
    one: CLIPTextModel, two: CLIPTextModelWithProjection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's conditioning: penultimate states of both towers side by side (B, L, D1 + D2), pooled (B, P) of the second."""
    states_one = one(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    output = two(input_ids=ids, output_hidden_states=True)
    return torch.cat([states_one, output.hidden_states[-2]], dim=-1), output.text_embeds


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents (N, 3, 12, 12) of images (N, 3, 24, 24), in slices that fit in a cache."""
    modes = [vae.encode(part).latent_dist.mode() for part in images.split(256)]
    return torch.cat(modes) * vae.config.scaling_factor


def train(
    work: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    one: CLIPTextModel,
    two: CLIPTextModelWithProjection,
    plan: Plan = PLAN,
) -> tuple[UNet2DConditionModel, dict[str, float]]:
    """Train epsilon prediction with min-SNR weights; one caption in ten is replaced by zeros (SDXL's empty prompt)."""
    torch.manual_seed(plan.seed)
    unet = build_unet(one.config.hidden_size + two.config.hidden_size, two.config.projection_dim)
    unet = unet.to(memory_format=torch.channels_last)
    pool = make_pool(_POOL, "train", plan.seed)
    latents = torch.cat([encode_images(vae, pool.batch(i)) for i in torch.arange(_POOL).split(2048)])
    ids = tokenize(tokenizer, pool.captions)
    alphas = build_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr
    time_ids = torch.tensor([[CANVAS, CANVAS, 0, 0, CANVAS, CANVAS]], dtype=torch.float32).expand(BATCH, 6)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        # one time per stratum of the batch: less variance in the loss than independent draws
        times = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (1000 / BATCH)).long()
        signal = alphas[times].view(-1, 1, 1, 1)
        noisy = (signal.sqrt() * clean + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        keep = (torch.rand(BATCH, generator=generator) >= CONDITION_DROPOUT).float()
        states, pooled = encode_text(one, two, ids[index])
        condition = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        output = unet(noisy, times, states * keep[:, None, None], added_cond_kwargs=condition).sample
        return ((output - noise).square().mean(dim=(1, 2, 3)) * weights[times]).mean()

    seconds = fit("teacher", unet, loss_of, plan, work)
    return unet.eval(), {"seconds": seconds}


def build_pipeline(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    one: CLIPTextModel,
    two: CLIPTextModelWithProjection,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def averaged_unet(state_file: Path, like: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy of `like` with the averaged weights of an unfinished training (`fit`'s state)."""
    state = torch.load(state_file, weights_only=True)
    like.load_state_dict(state["ema"])
    return like.eval()


def save(pipeline: DiffusionPipeline, path: Path) -> None:
    """Write a pipeline directory with half-precision files.

    The text towers' configurations say float32, so that transformers, which otherwise follows the file, computes in
    single precision as diffusers does.
    """
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(path)
    pipeline.to(dtype=torch.float32)
    for part in ("text_encoder", "text_encoder_2"):
        declare_float32(path / part / "config.json")


def report(
    pipeline: DiffusionPipeline,
    checker: PromptChecker,
    count: int = 2000,
    *,
    guided: float = GUIDANCE,
    **options: int,
) -> dict[str, float]:
    """Prompt accuracy and Frechet distance at 25 steps and at few, beside those of real held-out scenes.

    Two steps with guidance (of strength `guided`) and four without cost 4 forwards each. `options` go to the pipeline.
    """
    real = make_pool(2 * count, "held_out", 9000)
    images = real.batch(torch.arange(2 * count))
    features = checker.features(images)
    figures = {
        "count": count,
        "real_accuracy": float(checker.correct(images, real.captions).float().mean()),
        "real_frechet": frechet_distance(features[:count], features[count:]),
    }
    for name, steps, guidance in (
        ("25_steps_guided", 25, guided),
        ("4_steps_guided", 4, guided),
        ("2_steps_guided", 2, guided),
        ("1_step_guided", 1, guided),
        ("4_steps_unguided", 4, 1.0),
    ):
        accuracy, distance = evaluate(pipeline, checker, count, steps=steps, guidance=guidance, seed=0, **options)
        figures |= {f"{name}_accuracy": accuracy, f"{name}_frechet": distance}
    return figures


@torch.no_grad()
def evaluate(
    pipeline: DiffusionPipeline,
    checker: PromptChecker,
    count: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    **options: int,
) -> tuple[float, float]:
    """Prompt accuracy and Frechet distance of `count` samples for held-out captions, against held-out scenes.

    Captions come from one set of held-out scenes and the reference images from another.
    """
    captions = make_pool(count, "held_out", 7000 + seed).captions
    images = sample(pipeline, captions, steps=steps, guidance=guidance, seed=seed, **options)
    real = make_pool(count, "held_out", 8000 + seed).batch(torch.arange(count))
    accuracy = checker.correct(images, captions).float().mean()
    return float(accuracy), frechet_distance(checker.features(images), checker.features(real))


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline, captions: list[str], *, steps: int, guidance: float, seed: int, **options: int
) -> torch.Tensor:
    """Images (B, 3, 24, 24) in [-1, 1] from the plain pipeline; `options` are further arguments of its call."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(captions), 250):
        result = pipeline(
            captions[start : start + 250],
            height=CANVAS,
            width=CANVAS,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            generator=generator,
            **options,
        )
        images.append(result.images * 2 - 1)
    return torch.cat(images)
