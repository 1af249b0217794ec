"""Rollout: candidates for the preference updates, from published generator weights."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates, Prompts, PublishedWeights, noise, to_uint8
from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.config import Config
from flashdmd_ray.diffusion.sampling import backward_simulation, denoise_to_clean, step_distribution, timesteps_like
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.networks import group_family, prompt_noise, trained_network, x0_predictor


class Rollout:
    """Stateless but for a copy of the weights that the generator trains, which every call names by version."""

    def __init__(self, config: Config, family: Family, network: Denoiser, name: str = "rollout"):
        """name: of the worker, for errors."""
        self.config = config
        self.family = family
        self.schedule = family.schedule
        self.timesteps = config.sampling.timesteps
        self.network = network.eval().requires_grad_(False)
        self.version: int | None = None
        self._checksum = ""  # after a fault a version may be published anew
        self.name = name
        frozen = all(p.dtype == torch.float32 for p in family.teacher.parameters())
        self._staleness = StaleWeightsCheck(name, exact=frozen and config.engine.precision == "float32")

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Rollout:
        family = group_family(config, "rollout")
        return cls(config, family, trained_network(config, family, "generator"), f"rollout-{rank}")

    @property
    def device(self) -> torch.device:
        """Device of its networks."""
        return self.family.device

    def load_weights(self, weights: PublishedWeights) -> None:
        """Take over published weights, and the precision that the learner computes in: a candidate is drawn by the very network that the
        preference loss differentiates.

        Raises ValueError, naming the worker, when what the network holds then is not what was published, or when its output
        does not show the change.
        """
        if (self.version, self._checksum) == (weights.version, weights.checksum):
            return
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(weights.tensors[name].dtype)
        self.network.load_state_dict(weights.tensors)
        arrived = checksum(self.network.state_dict())
        if arrived != weights.checksum:
            raise ValueError(
                f"{self.name}: weights of version {weights.version} arrived with checksum {arrived}, published as {weights.checksum}"
            )
        self._staleness.check(weights.version, arrived, self._fingerprint())
        self.version, self._checksum = weights.version, weights.checksum

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


UNCHANGED_VERSIONS_ALLOWED = 20
"""Versions in a row that may leave the output as it was where half precision rounds small changes away."""


class StaleWeightsCheck:
    """Compares what a network holds and what it gives, version after version."""

    def __init__(self, name: str, exact: bool) -> None:
        """name: of the worker, for errors. exact: the network computes in float32, where every update shows."""
        self._name = name
        self._allowed = 0 if exact else UNCHANGED_VERSIONS_ALLOWED
        self._last: tuple[str, str] | None = None
        self._unchanged = 0

    def check(self, version: int, weights: str, output: str) -> None:
        """weights, output: checksums after `version` was loaded. Raises ValueError when weights changed and the output did not."""
        before, self._last = self._last, (weights, output)
        if before is None or before[0] == weights:
            return
        self._unchanged = self._unchanged + 1 if before[1] == output else 0
        if self._unchanged > self._allowed:
            raise ValueError(
                f"{self._name}: weights of version {version} differ from those before, but the network's output for a fixed input does "
                "not: the worker samples with stale weights"
            )
