"""A model family: one pretrained text-to-image model, frozen, as the teacher and the spaces it works in.

What all families share is here. A family's own file (sdxl.py, sd15.py, sd3.py) says which stock modules it has, how
prompts become conditioning, and how its modules make a diffusers pipeline again.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from flashdmd_ray.catalog.families import FAMILIES, latent_size
from flashdmd_ray.config import ModelConfig
from flashdmd_ray.diffusion.schedule import NoiseSchedule, schedule_from_config
from flashdmd_ray.models.config_checks import check_network, check_same_latents, check_shape, check_vae
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.headers import ModelFileError
from flashdmd_ray.models.locations import resolve
from flashdmd_ray.models.pipeline_source import PipelineSource, load_vae_file, open_source
from flashdmd_ray.models.single_file import vae_file
from flashdmd_ray.models.stock_modules import load_config, load_module, load_part
from flashdmd_ray.models.weight_reading import weights_device

PARTS = ("denoiser", "vae", "text")
_ENCODING = threading.Lock()
"""Tokenizers, and the cache of embeddings, are for one thread at a time."""


class TextTowers(nn.Module, ABC):
    """Frozen text encoders with their tokenizers and a cache of embeddings, by text."""

    # Prompts are encoded this many at a time, the last group padded. One fixed shape means the same kernels, so that an
    # embedding does not depend on which prompts it was computed beside: resumed and distributed runs stay bit-
    # identical.
    GROUP = 8
    CACHE_BYTES = 256 * 2**20

    def __init__(self) -> None:
        super().__init__()
        self._cache: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self.stored: Callable[[Sequence[str]], Mapping[str, tuple[Tensor, ...]]] | None = None
        """Rows computed before the run (data.embeddings), looked up before a text is encoded."""

    @abstractmethod
    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Embeddings (GROUP, ...) of GROUP texts, each in the type its encoder computes in."""

    def forget(self) -> None:
        """Empty the cache, whose embeddings stay on the device they were computed on."""
        self._cache.clear()

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """The embeddings of `encode_group` as float32 (B, ...), without gradients; cached per text. Safe for threads."""
        with _ENCODING:
            self._fill([text for text in dict.fromkeys(texts) if text not in self._cache])
            for text in texts:
                self._cache.move_to_end(text)
            rows = [self._cache[text] for text in texts]
            room = max(1, self.CACHE_BYTES // sum(tensor.nbytes for tensor in rows[0]))
            while len(self._cache) > room:
                self._cache.popitem(last=False)
        return tuple(torch.stack(column).float() for column in zip(*rows, strict=True))

    def _fill(self, texts: Sequence[str]) -> None:
        if self.stored is not None:
            device = next(self.parameters()).device
            for text, columns in self.stored(texts).items():
                self._cache[text] = tuple(tensor.to(device) for tensor in columns)
            texts = [text for text in texts if text not in self._cache]
        for start in range(0, len(texts), self.GROUP):
            group = list(texts[start : start + self.GROUP])
            columns = self.encode_group(group + [""] * (self.GROUP - len(group)))
            for row, text in enumerate(group):
                self._cache[text] = tuple(column[row].clone() for column in columns)


def clip_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids int64 (B, L) of a CLIP text encoder, cut and filled up to its length."""
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class Family(ABC):
    """One pretrained model of one family, frozen, in evaluation mode.

    schedule: its forward process, from scheduler_config, the model's own. latent_shape: (C, h, w). image_size: (H, W)
    in pixels. Using a part that was not loaded raises AttributeError, which is a programming error.
    """

    name: ClassVar[str]
    """The family's name in the configuration."""
    pipeline_class: ClassVar[Any]
    """The stock pipeline whose directories the family reads and writes."""

    def __init__(self, model: ModelConfig, source: PipelineSource, parts: Collection[str]) -> None:
        self.path = source.path
        self.scheduler_config: Mapping[str, Any] = source.scheduler()
        self.schedule: NoiseSchedule = load_part(self.path, "the scheduler", self._read_schedule)
        self.device = weights_device()
        network = source.config(FAMILIES[self.name].denoiser)
        vae = _config_of_vae(source, model)
        entry = FAMILIES[self.name]
        encoders = {name: source.config(name) for name in entry.text_encoders}
        folder = Path(self.path) / entry.denoiser
        load_part(self.path, entry.denoiser, lambda: check_network(network, encoders, entry, folder))
        try:
            check_shape(vae, Path(model.vae or f"{self.path}/vae"))
            check_vae(vae, entry, network["in_channels"], model.vae or f"the VAE of {self.path}")
            if model.vae is not None:
                check_same_latents(vae, source.config("vae"), model.vae)
        except ModelFileError as error:
            raise ValueError(f"model.vae: {error}" if model.vae else f"cannot load {error}") from None
        height, width, pixels = latent_size(model.resolution, network, vae)
        self.latent_shape = (int(network["in_channels"]), height, width)
        self.image_size = (height * pixels, width * pixels)
        dtype: torch.dtype = getattr(torch, model.dtype)
        self._source = source
        self._loaders: dict[str, Callable[[], nn.Module]] = {
            "denoiser": lambda: self._load_denoiser(source, dtype),
            "vae": lambda: _load_vae(source, model.vae, dtype),
            "text": lambda: self._load_text(source, dtype),
        }
        self._modules: dict[str, nn.Module] = {}
        self.load(parts)

    def _read_schedule(self) -> NoiseSchedule:
        try:
            return schedule_from_config(self.scheduler_config)
        except ValueError as error:  # names its remedy
            raise ModelFileError(str(error)) from None

    @classmethod
    def from_config(cls, model: ModelConfig, parts: Collection[str] = PARTS) -> Self:
        """Load `parts` ("denoiser", "vae", "text") of the configured model. Raises ValueError, one line with the remedy."""
        return cls(
            model,
            open_source(cls.pipeline_class, resolve(model.teacher, FAMILIES[cls.name].demo), model.teacher_config),
            parts,
        )

    @classmethod
    def from_pretrained(cls, path: str, parts: Collection[str] = PARTS, **settings: Any) -> Self:
        """`from_config` with `teacher` = path and other fields of `ModelConfig`."""
        return cls.from_config(ModelConfig.model_validate({"family": cls.name, "teacher": path, **settings}), parts)

    def load(self, parts: Collection[str]) -> Self:
        """Load those of `parts` that are missing, onto the family's device; returns self.

        Raises ValueError as `from_config` does.
        """
        assert set(parts) <= set(PARTS), f"unknown parts {set(parts) - set(PARTS)}"
        for part in PARTS:
            if part in parts and part not in self._modules:
                self._modules[part] = self._loaders[part]().requires_grad_(False).eval().to(self.device)
        return self

    @abstractmethod
    def _load_denoiser(self, source: PipelineSource, dtype: torch.dtype) -> Denoiser: ...

    @abstractmethod
    def _load_text(self, source: PipelineSource, dtype: torch.dtype) -> TextTowers: ...

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning float32 of `texts`, as the stock pipeline makes it; no gradients; cached."""

    @property
    @abstractmethod
    def text(self) -> TextTowers:
        """The frozen text encoders."""

    @property
    @abstractmethod
    def pooled_width(self) -> int:
        """Size of a pooled prompt embedding. Raises ValueError for a family without one."""

    @abstractmethod
    def pipeline(self, denoiser: Denoiser, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """A stock pipeline of `denoiser`, `scheduler` and this family's other modules, which must all be loaded."""

    def load_settings(self) -> dict[str, Any]:
        """Arguments that the stock pipeline's from_pretrained needs for a directory of these modules, as JSON values."""
        return {}

    def call_settings(self) -> dict[str, Any]:
        """Arguments that the stock pipeline must be called with to do what was trained, as JSON values."""
        return {"height": self.image_size[0], "width": self.image_size[1]}

    def _part(self, part: str) -> Any:
        if part not in self._modules:
            raise AttributeError(f"the part {part!r} of {self.path} was not loaded in this process")
        return self._modules[part]

    @property
    def teacher(self) -> Denoiser:
        """The frozen pretrained denoiser."""
        return self._part("denoiser")

    @property
    def vae(self) -> AutoencoderKL:
        return self._part("vae")

    @property
    def mid_width(self) -> int:
        """Channels of the denoiser's mid features."""
        return self.teacher.mid_width

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part; returns self."""
        self.device = torch.device(device)
        for module in self._modules.values():
            module.to(self.device)
            if isinstance(module, TextTowers):
                module.forget()
        return self

    def denoiser(self, gradient_checkpointing: bool = False) -> Denoiser:
        """Trainable float32 copy of the teacher, from which generator and score estimator start."""
        fresh = copy.deepcopy(self.teacher).float().requires_grad_(True)
        if gradient_checkpointing:
            fresh.network.enable_gradient_checkpointing()
        return fresh.train()

    def file_weights(self) -> Mapping[str, Tensor]:
        """Weights float32 of the denoiser by parameter name, as the teacher's files hold them.

        They are read again where the frozen teacher is kept in half precision, which rounded them.
        """
        if all(p.dtype == torch.float32 for p in self.teacher.parameters()):
            return self.teacher.state_dict()
        return self._load_denoiser(self._source, torch.float32).state_dict()

    def unconditional(self, count: int) -> Conditioning:
        """Conditioning of the unconditional branch of classifier-free guidance, `count` rows: the embedding of ""."""
        return self.encode([""] * count)

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W), nominally in [-1, 1], of `latents` float32 (B, C, h, w); differentiable.

        Values just outside the range are not clamped, because a clamp would stop the gradient there.
        """
        mean, deviation = self._latent_statistics(latents.device)
        scaled = latents * deviation / self.vae.config.scaling_factor + mean
        return self.vae.decode(scaled.to(self.vae.dtype)).sample.float()

    def _latent_statistics(self, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation of the VAE's own latents (1, C, 1, 1), which are (z - mean) / deviation * scaling_factor here."""
        config = self.vae.config
        if getattr(config, "latents_mean", None) is None:
            return config.shift_factor or 0.0, 1.0
        values = torch.tensor([list(config.latents_mean), list(config.latents_std)], device=device)
        mean, deviation = values.view(2, 1, -1, 1, 1)
        return mean, deviation

    def checkpoint_decoder(self) -> None:
        """From now on, compute each block of the decoder again in the backward pass: less memory at 1024 pixels."""
        self.vae.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents float32 (B, C, h, w) of `images` float (B, 3, H, W) in [-1, 1].

        A sample of the posterior with `noise` float (B, C, h, w), its mean without.
        """
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        mean, deviation = self._latent_statistics(latents.device)
        return (latents - mean) * self.vae.config.scaling_factor / deviation


def _load_vae(source: PipelineSource, other: str | None, dtype: torch.dtype) -> nn.Module:
    if other is not None and other.endswith(".safetensors"):
        return load_vae_file(other, source.configs, dtype)
    module: nn.Module = (
        source.module(AutoencoderKL, "vae", dtype) if other is None else load_module(AutoencoderKL, other, "", dtype)
    )
    return module


def _config_of_vae(source: PipelineSource, model: ModelConfig) -> Mapping[str, Any]:
    """Configuration of the VAE: the teacher's, another directory's, or the teacher's with the channels of a file's latents."""
    if model.vae is None:
        return source.config("vae")
    if not model.vae.endswith(".safetensors"):
        return load_config(AutoencoderKL, model.vae, part="the VAE")
    _, channels = load_part(model.vae, "the VAE", lambda: vae_file(Path(str(model.vae))))
    return {**source.config("vae"), "latent_channels": channels}
