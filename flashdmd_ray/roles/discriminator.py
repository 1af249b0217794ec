"""The pixel discriminator D_omega: frozen decoder, frozen SAM features, trained heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Latents, Metrics
from flashdmd_ray.checkpoint import Destination, load_tensors
from flashdmd_ray.config import Config, EngineConfig
from flashdmd_ray.data import ImageSource, open_reals
from flashdmd_ray.engine import Engine, build_engine
from flashdmd_ray.losses.adversarial import discriminator_loss, generator_loss, halves
from flashdmd_ray.models.discriminator import PixelDiscriminator
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.locations import resolve
from flashdmd_ray.models.sam import load_sam_encoder
from flashdmd_ray.roles.networks import TrainedRole, group_family, save_engine
from flashdmd_ray.run.storage import Location


class Discriminator(TrainedRole):
    """Tells decoded samples from real images, and gives the generator a gradient in latent space."""

    def __init__(self, config: Config, family: Family, engine: Engine, images: ImageSource):
        super().__init__(config, family, engine)
        self.images = images

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Discriminator:
        reads_prompts = config.adversarial.prompt_projection
        family = group_family(config, "discriminator", ("vae", "text") if reads_prompts else ("vae",))
        sam = resolve(config.model.sam, "sam")
        encoder = load_sam_encoder(sam, max(family.image_size), getattr(torch, config.model.dtype))
        prompt_width = family.pooled_width if reads_prompts else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = PixelDiscriminator(
                encoder, config.adversarial.hidden, prompt_width, config.engine.gradient_checkpointing
            )
        if config.engine.gradient_checkpointing:
            family.checkpoint_decoder()
        # The heads are small: nothing to shard, to round or to send away.
        plain = EngineConfig(accumulation=config.critic_micro_batches)
        engine = build_engine(plain, network.to(family.device), config.adversarial.optimizer, role="discriminator")
        return cls(config, family, engine, open_reals(config, family))

    def gan_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        """Per-sample dL_adv/dlatents, float32 (B, C, h, w), through decoder and SAM. The heads do not move.

        `timesteps` and `seed` serve the DMD2 form, which judges renoised latents.
        """
        prompts, losses = self._prompts(fakes), []
        gradients: list[Tensor] = []
        for rows in self._in_turn(self.engine.cut(len(fakes.values))):
            latents = fakes.values[rows].detach().requires_grad_()
            logits = self.engine.module(self.family.decode(latents), None if prompts is None else prompts[rows])
            loss = len(latents) * generator_loss(logits, self.config.adversarial.loss)
            gradients += torch.autograd.grad(loss, latents)
            losses.append(loss.item())
        return torch.cat(gradients), {"adversarial/generator_loss": sum(losses) / len(fakes.values)}

    def step(self, fakes: Latents, real_positions: Tensor) -> Metrics:
        """Make one update of the heads: decoded fakes against the real images at `real_positions`, int64 (B,)."""
        with torch.no_grad():
            real_images, captions, replaced = self._reals(real_positions)
        prompts = self._prompts(fakes)
        real_prompts = None if prompts is None else self.family.encode(captions).pooled
        loss, logit_pairs = torch.zeros(()), []
        for rows in self._in_turn(self.engine.micro_batches(len(real_images))):
            with torch.no_grad():
                images = torch.cat([real_images[rows], self.family.decode(fakes.values[rows])])
            both = None if prompts is None or real_prompts is None else torch.cat([real_prompts[rows], prompts[rows]])
            logits = self.engine(images, both)
            loss += self.engine.backward(discriminator_loss(*halves(logits), self.config.adversarial.loss)).cpu()
            logit_pairs.append(torch.stack(halves(logits)).detach())
        norm = self.engine.update("distillation")
        real_logits, fake_logits = torch.cat(logit_pairs, dim=1)
        return {
            "discriminator/loss": loss.item(),
            "discriminator/grad_norm": norm,
            "discriminator/lr": self.engine.rate,
            "discriminator/accuracy_real": (real_logits > 0).float().mean().item(),
            "discriminator/accuracy_fake": (fake_logits < 0).float().mean().item(),
            "data/replaced": replaced / len(real_images),
        }

    def _in_turn(self, parts: Iterable[slice]) -> Iterator[slice]:
        """The spectral norms take their step of power iteration in the first part alone: one for a batch, however it is cut."""
        for rows in parts:
            self.engine.module.train(rows.start == 0)
            yield rows
        self.engine.module.train()

    def data_report(self) -> tuple[str, ...]:
        """The bad samples that this rank met and replaced, as "reason<tab>name"."""
        return self.images.report().pairs()

    def _reals(self, positions: Tensor) -> tuple[Tensor, tuple[str, ...], int]:
        """Real images, their captions, and how many stand in for a bad one."""
        size = self.family.image_size
        if not self.config.adversarial.real_through_vae:
            reals = self.images.reals(positions, size)
            return reals.images.to(self.device), reals.captions, reals.replaced
        encoded = self.images.latents(positions, size, self.family.encode_images)
        return self.family.decode(encoded.values.to(self.device)), encoded.captions, encoded.replaced

    def _prompts(self, latents: Latents) -> Tensor | None:
        return self.family.encode(latents.prompts.texts).pooled if self.config.adversarial.prompt_projection else None

    def save(self, directory: Path | Destination) -> None:
        save_engine(directory / "discriminator.safetensors", self.engine)

    def load(self, directory: Location) -> None:
        self.engine.load_state(load_tensors(directory / "discriminator.safetensors"))
