"""The SDXL family over stock diffusers and transformers modules: U-Net, VAE, two text encoders, micro-conditioning."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.diffusion.schedule import NoiseSchedule, schedule_from_config
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.loading import load_config, load_module, load_tokenizer

PARTS = ("unet", "vae", "text")


class _MidBlockReached(Exception):  # not an error: ends a forward that has computed enough
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class SDXLDenoiser(Denoiser):
    """An SDXL-form `UNet2DConditionModel` behind the common call."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.unet.dtype
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids.to(dtype)}
        prediction = self.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            added_cond_kwargs=added,
        )
        return prediction.sample.float()

    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output of the mid block (B, mid_width, h', w'), for DMD2's adversary; the up path is not computed."""

        def stop(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            raise _MidBlockReached(output)

        hook = self.unet.mid_block.register_forward_hook(stop)
        try:
            self(noisy, timesteps, conditioning)
        except _MidBlockReached as reached:
            return reached.features
        finally:
            hook.remove()
        raise AssertionError("an SDXL-form U-Net has a mid block")


class TextTowers(nn.Module):
    """SDXL's two CLIP text encoders with their tokenizers."""

    # Prompts are encoded this many at a time, the last group padded. One fixed shape means the same kernels, so that an
    # embedding does not depend on which prompts it was computed beside: resumed and distributed runs stay bit-
    # identical.
    GROUP = 8
    CACHE_BYTES = 256 * 2**20

    def __init__(
        self, tokenizers: Sequence[CLIPTokenizer], encoder: CLIPTextModel, encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizers = tuple(tokenizers)
        self.encoder = encoder
        self.encoder_2 = encoder_2
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        # What the two encoders will answer: needed before any prompt was encoded, for the zero embeddings.
        self.length = int(self.tokenizers[0].model_max_length)
        self.width = int(encoder.config.hidden_size + encoder_2.config.hidden_size)
        self.pooled_width = int(encoder_2.config.projection_dim)

    def forget(self) -> None:
        """Empty the cache, whose embeddings stay on the device they were computed on."""
        self._cache.clear()

    @torch.no_grad()
    def _encode_group(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, (self.encoder, self.encoder_2), strict=True):
            ids = tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])  # the penultimate layer, as SDXL was trained
        return torch.cat(hidden, dim=-1).float(), output.text_embeds.float()

    def _fill(self, texts: Sequence[str]) -> None:
        for start in range(0, len(texts), self.GROUP):
            group = list(texts[start : start + self.GROUP])
            padded = group + [""] * (self.GROUP - len(group))
            sequences, pooled = self._encode_group(padded)
            for row, text in enumerate(group):
                self._cache[text] = (sequences[row].clone(), pooled[row].clone())

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings float32 (B, L, D) and pooled embeddings float32 (B, P), without gradients; cached per
        text."""
        self._fill([text for text in dict.fromkeys(texts) if text not in self._cache])
        for text in texts:
            self._cache.move_to_end(text)
        rows = [self._cache[text] for text in texts]
        room = max(1, self.CACHE_BYTES // (4 * (self.length * self.width + self.pooled_width)))
        while len(self._cache) > room:
            self._cache.popitem(last=False)
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


class SDXL:
    """One pretrained SDXL-form text-to-image model, frozen, in evaluation mode: the teacher and the spaces it works in.

    schedule: its forward process, from scheduler_config, the directory's own. latent_shape: (C, h, w). image_size:
    (H, W) in pixels. Parts that were not asked for are absent: using one raises AttributeError, which is a
    programming error.
    """

    def __init__(
        self,
        path: str,
        scheduler_config: Mapping[str, Any],
        latent_shape: tuple[int, int, int],
        image_size: tuple[int, int],
        zero_unconditional: bool,
        modules: dict[str, nn.Module],
    ) -> None:
        self.path = path
        self.scheduler_config = scheduler_config
        self.schedule: NoiseSchedule = schedule_from_config(scheduler_config)
        self.latent_shape = latent_shape
        self.image_size = image_size
        self.device = torch.device("cpu")
        self.checkpoint_decoder = False  # recompute the decoder in the backward pass: less memory at 1024 pixels
        self.zero_unconditional = zero_unconditional
        self._modules = {name: module.requires_grad_(False).eval() for name, module in modules.items()}

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype = torch.float32, parts: Collection[str] = PARTS) -> Self:
        """Read a StableDiffusionXLPipeline directory or hub repository; only `parts` of "unet", "vae", "text" are
        loaded.

        The VAE stays in float32 when `dtype` is float16, in which SDXL's own VAE overflows. Raises ValueError, one
        line that names the path and the remedy, when anything is missing, damaged or of another kind.
        """
        path = str(path)
        assert set(parts) <= set(PARTS), f"unknown parts {set(parts) - set(PARTS)}"
        index = load_config(StableDiffusionXLPipeline, path)
        if index.get("_class_name") != "StableDiffusionXLPipeline":
            raise ValueError(
                f"{path} holds a {index.get('_class_name')}, not a StableDiffusionXLPipeline: choose the model family that matches it"
            )
        scheduler_config = load_config(DDPMScheduler, path, "scheduler")
        unet_config = load_config(UNet2DConditionModel, path, "unet")
        vae_config = load_config(AutoencoderKL, path, "vae")
        side = int(unet_config["sample_size"])
        pixels = side * 2 ** (len(vae_config["block_out_channels"]) - 1)
        modules: dict[str, nn.Module] = {}
        if "unet" in parts:
            modules["unet"] = SDXLDenoiser(load_module(UNet2DConditionModel, path, "unet", dtype))
        if "vae" in parts:
            vae_dtype = torch.float32 if dtype == torch.float16 else dtype
            modules["vae"] = load_module(AutoencoderKL, path, "vae", vae_dtype)
        if "text" in parts:
            modules["text"] = _load_text(path, dtype)
        zero = bool(index.get("force_zeros_for_empty_prompt", True))
        return cls(
            path, scheduler_config, (int(unet_config["in_channels"]), side, side), (pixels, pixels), zero, modules
        )

    def _part(self, name: str) -> Any:
        if name not in self._modules:
            raise AttributeError(f"the part {name!r} of {self.path} was not loaded in this process")
        return self._modules[name]

    @property
    def teacher(self) -> SDXLDenoiser:
        """The frozen pretrained denoiser."""
        return self._part("unet")

    @property
    def vae(self) -> AutoencoderKL:
        return self._part("vae")

    @property
    def text(self) -> TextTowers:
        return self._part("text")

    @property
    def pooled_width(self) -> int:
        """Size of a pooled prompt embedding."""
        return self.text.pooled_width

    @property
    def mid_width(self) -> int:
        """Channels of the denoiser's mid block."""
        return int(self.teacher.unet.config.block_out_channels[-1])

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part; returns self."""
        self.device = torch.device(device)
        for module in self._modules.values():
            module.to(self.device)
        if "text" in self._modules:
            self.text.forget()
        return self

    def denoiser(self, gradient_checkpointing: bool = False) -> SDXLDenoiser:
        """A trainable float32 copy of the teacher: the start of the generator and of the score estimator."""
        fresh = copy.deepcopy(self.teacher).float().requires_grad_(True)
        if gradient_checkpointing:
            fresh.unet.enable_gradient_checkpointing()
        return fresh.train()

    def _time_ids(self, count: int) -> Tensor:
        height, width = self.image_size
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device).repeat(
            count, 1
        )

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning float32 of `texts`, both encoders as StableDiffusionXLPipeline uses them; no gradients;
        cached."""
        sequences, pooled = self.text(texts)
        return Conditioning(sequences, pooled, self._time_ids(len(texts)))

    def unconditional(self, count: int) -> Conditioning:
        """The other branch of classifier-free guidance: zero embeddings, or those of "" where the model was trained
        so."""
        if not self.zero_unconditional:
            return self.encode([""] * count)
        towers = self.text
        sequences = torch.zeros(count, towers.length, towers.width, device=self.device)
        return Conditioning(
            sequences, torch.zeros(count, towers.pooled_width, device=self.device), self._time_ids(count)
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W), nominally in [-1, 1], of `latents` float32 (B, C, h, w); differentiable.

        Values just outside the range are not clamped, because a clamp would stop the gradient there.
        """
        if self.checkpoint_decoder and torch.is_grad_enabled():
            return checkpoint(self._decode, latents, use_reentrant=False)
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config.scaling_factor
        return self.vae.decode(scaled.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents float32 (B, C, h, w) of `images` float (B, 3, H, W) in [-1, 1].

        A sample of the posterior with `noise` float (B, C, h, w), its mean without.
        """
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return latents * self.vae.config.scaling_factor


def _load_text(path: str, dtype: torch.dtype) -> TextTowers:
    encoder = load_module(CLIPTextModel, path, "text_encoder", dtype)
    encoder_2 = load_module(CLIPTextModelWithProjection, path, "text_encoder_2", dtype)
    tokenizers = [
        load_tokenizer(path, name, owner.config.max_position_embeddings, owner.config.vocab_size)
        for name, owner in (("tokenizer", encoder), ("tokenizer_2", encoder_2))
    ]
    return TextTowers(tokenizers, encoder, encoder_2)
