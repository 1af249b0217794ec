"""Base of the latent reward models: features of a diffusion network's blocks, compared with the prompt as CLIP compares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family


class NoisyLatentReward(nn.Module, ABC):
    """A frozen model that scores noisy latents against their prompts; a higher reward is better."""

    parts: ClassVar[tuple[str, ...]] = ("text",)
    """Parts of the teacher's family that it computes with."""

    @abstractmethod
    def score(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], family: Family) -> Tensor:
        """Rewards float32 (B,) of noisy latents float (B, C, h, w) at training timesteps int64 (B,), one text each.

        They are comparable only between latents of one prompt and timestep. family: the model family whose latents these are. Raises
        ValueError when the reward was made for another.
        """


class LatentRewardModel(NoisyLatentReward):
    """reward = exp(logit_scale) cos(visual_projection(features), text), after LPO (arXiv 2502.01051).

    features: averages over the image of what some blocks of the diffusion network itself make of the noisy latent; the blocks read the
    timestep, so one model serves every noise level. text: the pooled prompt embedding that the family conditions on. A family without one
    (SD1.5) gives the state of the last token through a trained `text_projection`: CLIP fills every prompt up to its length and reads it
    from left to right, so the last state has seen all of it. (LPO projects the state of the end-of-text token, which a conditioning
    does not tell from the others.)
    """

    kind: ClassVar[str]
    """Attribute that holds the network's blocks, and the key of their configuration in a saved directory."""

    def __init__(self, feature_width: int, text_width: int, token_width: int | None) -> None:
        """Make untrained projections.

        text_width: of the text embedding. token_width: of a token's state where there is no pooled embedding, else None.
        """
        super().__init__()
        self.text_width = text_width
        self.visual_projection = nn.Linear(feature_width, text_width, bias=False)
        self.text_projection = None if token_width is None else nn.Linear(token_width, text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    @abstractmethod
    def from_description(cls, config: Mapping[str, Any]) -> Self:
        """A model with random weights of the form that `description` states."""

    @classmethod
    @abstractmethod
    def from_denoiser(cls, network: ModelMixin, blocks: int | None = None) -> Self:
        """An untrained model whose blocks are float32 copies of `network`'s.

        blocks: how many are kept; None is the form's default. Raises ValueError where that means nothing.
        """

    @property
    @abstractmethod
    def network(self) -> ModelMixin:
        """The kept part of the diffusion network."""

    @property
    def last_part(self) -> str:
        """Name of the part that is trained when the blocks before it stay the teacher's."""
        raise NotImplementedError

    def as_blocks(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of the whole diffusion network in the shapes that the kept blocks have them in."""
        return state

    @abstractmethod
    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Features (B, feature_width) in the type of the network."""

    @abstractmethod
    def description(self) -> Mapping[str, Any]:
        """JSON values from which `from_description` makes the same model with other weights."""

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Rewards float32 (B,): higher is better, comparable only between latents of one prompt and timestep.

        noisy float (B, C, h, w); timesteps int64 or float (B,), as the network was trained to read them
        (`NoiseSchedule.network_timestep`); conditioning of B prompts, as the family makes it.
        """
        image = self.visual_projection(self.features(noisy, timesteps, conditioning))
        cosine = F.cosine_similarity(image.float(), self._text(conditioning).float(), dim=-1)
        return self.logit_scale.float().exp() * cosine

    def score(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], family: Family) -> Tensor:
        """See `NoisyLatentReward.score`."""
        if noisy.shape[1] != self.network.config.in_channels:
            raise ValueError(
                f"the latent reward reads latents of {self.network.config.in_channels} channels, these have {noisy.shape[1]}: "
                "it was made for another model family"
            )
        return self(noisy, family.schedule.network_timestep(timesteps), family.encode(texts))

    def _text(self, conditioning: Conditioning) -> Tensor:
        if self.text_projection is not None:
            return self.text_projection(conditioning.prompt_embeds[:, -1].to(self.text_projection.weight.dtype))
        assert conditioning.pooled is not None, "a reward without a text_projection compares with the pooled embedding"
        return conditioning.pooled
