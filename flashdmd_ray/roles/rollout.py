"""Rollout: candidates for the preference updates, from published generator weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from flashdmd_ray.batch import Candidates, Prompts, PublishedWeights, noise, to_uint8
from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.config import Config
from flashdmd_ray.diffusion.sampling import backward_simulation, denoise_to_clean, step_distribution, timesteps_like
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.networks import group_family, prompt_noise, trained_network, x0_predictor


class Rollout:
    """Draws candidates with a copy of the weights that the generator trains, which every call names by version.

    In the generator's own process (`LiveRollout`) it draws with the generator's network.
    """

    neighbour = "generator"
    """The role whose network it draws with where both live in one process."""

    def __init__(self, config: Config, family: Family, network: Module, name: str = "rollout"):
        """name: of the worker, for errors."""
        self.config = config
        self.family = family
        self.schedule = family.schedule
        self.timesteps = config.sampling.timesteps
        self.network = network
        self.version: int | None = None
        self._loaded = ""
        self.name = name
        frozen = all(p.dtype == torch.float32 for p in family.teacher.parameters())
        self._staleness = StaleWeightsCheck(name, exact=frozen and config.engine.precision == "float32")

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Rollout:
        family = group_family(config, "rollout")
        network = trained_network(config, family, "generator").eval().requires_grad_(False)
        return cls(config, family, network, f"rollout-{rank}")

    @classmethod
    def from_neighbour(cls, generator: Generator) -> LiveRollout:
        """Rollouts in the generator's process."""
        generator.family.load(("vae",))
        return LiveRollout(generator.config, generator.family, generator.engine.module)

    @property
    def device(self) -> torch.device:
        """Device of its networks."""
        return self.family.device

    def load_weights(self, weights: PublishedWeights) -> None:
        """Take over published weights, and the precision that the learner computes in: a candidate is drawn by the very network that the
        preference loss differentiates.

        Raises ValueError, naming the worker, when they are of another network, or when its output does not show the change.
        """
        if self._loaded == weights.key:
            return
        state = self.network.state_dict(keep_vars=True)
        if state.keys() != weights.tensors.keys():
            other = sorted(state.keys() ^ weights.tensors.keys())
            raise ValueError(f"{self.name}: weights of version {weights.version} are of another network: {other[0]}")
        changed = False
        for name, tensor in state.items():
            published = weights.tensors[name].to(self.device)
            tensor.data = tensor.data.to(published.dtype)
            changed = changed or not torch.equal(tensor, published)
            tensor.data.copy_(published)
        self._staleness.check(weights.version, changed, self._fingerprint())
        self.version, self._loaded = weights.version, weights.key

    @torch.no_grad()
    def _fingerprint(self) -> str:
        """Checksum of the network's output for one fixed input: pure noise at the first timestep, without a prompt."""
        index = torch.zeros(1, dtype=torch.long, device=self.device)
        noisy = noise(index, self.family.latent_shape, seed=0, stream="proof")
        output = x0_predictor(self.network, self.schedule, self.family.unconditional(1))(
            noisy, timesteps_like(self.timesteps[0], noisy)
        )
        return checksum({"output": output})

    @torch.no_grad()
    def candidates(
        self, prompts: Prompts, high: int, seed: int, weights: PublishedWeights, decode: bool = True
    ) -> Candidates:
        """K renoised candidates from one noisy latent at step index `high`: z^k = mean + std e^k.

        decode: make the image that each candidate becomes; without, there are none for rewards to read.
        """
        self.load_weights(weights)
        shape, count = self.family.latent_shape, self.config.preference.candidates
        conditioning = self.family.encode(prompts.texts)
        predict_x0 = x0_predictor(self.network, self.schedule, conditioning)
        noisy = backward_simulation(
            predict_x0, self.schedule, self.timesteps, high, prompt_noise(prompts, shape, seed, "simulate")
        )
        x0 = predict_x0(noisy, timesteps_like(self.timesteps[high], noisy))
        mean, std = step_distribution(self.schedule, x0, self.timesteps[high + 1])
        values = mean[:, None] + std * noise(prompts.indices, (count, *shape), seed, "candidates")
        if decode:
            images = self._decode(self._denoise_candidates(values, high + 1, conditioning, prompts, seed))
        else:
            images = torch.zeros((len(values), 0, 3, *self.family.image_size), dtype=torch.uint8)
        return Candidates(
            prompts, noisy, values, images, self.timesteps[high], self.timesteps[high + 1], weights.version
        )

    def _decode(self, clean: Tensor) -> Tensor:
        """Images uint8 (B, K, 3, H, W) of latents (B, K, C, h, w); `preference.decode_batch` at a time, whatever B and K."""
        parts = clean.flatten(0, 1).split(self.config.preference.decode_batch)
        images = torch.cat([to_uint8(self.family.decode(part)) for part in parts])
        return images.unflatten(0, clean.shape[:2])

    def _denoise_candidates(
        self, values: Tensor, step_index: int, conditioning: Conditioning, prompts: Prompts, seed: int
    ) -> Tensor:
        """Each candidate as a clean latent, float32 (B, K, C, h, w)."""
        groups, count = values.shape[:2]
        flat = values.flatten(0, 1)
        predict_x0 = x0_predictor(self.network, self.schedule, conditioning.repeat_interleave(count))
        clean = predict_x0(flat, timesteps_like(self.timesteps[step_index], flat))
        if self.config.preference.candidate_image == "remaining_steps":
            # Every candidate of a group takes the same later noise, so that the reward compares the candidates and nothing else.
            shared = prompt_noise(prompts, self.family.latent_shape, seed, "carry")
            clean = denoise_to_clean(
                predict_x0,
                self.schedule,
                self.timesteps,
                step_index,
                clean,
                lambda k: shared(k).repeat_interleave(count, dim=0),
            )
        return clean.unflatten(0, (groups, count))


class LiveRollout(Rollout):
    """Rollouts in the generator's process: they draw with its network, so its calls must end before the generator is updated."""

    def load_weights(self, weights: PublishedWeights) -> None:
        """Take over the version's number: the weights are there."""
        self.version = weights.version


UNCHANGED_VERSIONS_ALLOWED = 20
"""Versions in a row that may leave the output as it was where half precision rounds small changes away."""


class StaleWeightsCheck:
    """Compares what a network holds and what it gives, version after version."""

    def __init__(self, name: str, exact: bool) -> None:
        """name: of the worker, for errors. exact: the network computes in float32, where every update shows."""
        self._name = name
        self._allowed = 0 if exact else UNCHANGED_VERSIONS_ALLOWED
        self._last: str | None = None
        self._unchanged = 0

    def check(self, version: int, changed: bool, output: str) -> None:
        """changed: `version` brought other weights. output: its checksum. Raises ValueError when weights changed and the output did not."""
        before, self._last = self._last, output
        if before is None or not changed:
            return
        self._unchanged = self._unchanged + 1 if before == output else 0
        if self._unchanged > self._allowed:
            raise ValueError(
                f"{self._name}: weights of version {version} differ from those before, but the network's output for a fixed input does "
                "not: the worker samples with stale weights"
            )
