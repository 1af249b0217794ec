"""The loop of one rank: pairs, noise, the 2-way softmax loss, one update. Knows nothing of who runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from flashdmd_ray.batch import Metrics, StepRng, noise
from flashdmd_ray.checkpoint import load_tensors, save_tensors
from flashdmd_ray.engine import Engine, build_engine
from flashdmd_ray.engine.ema import EMA
from flashdmd_ray.engine.state import under
from flashdmd_ray.losses.reward_model import pair_loss
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import LatentRewardModel, NoisyLatentReward, latent_reward_of
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.pairs import PairFiles, Pairs
from flashdmd_ray.roles.networks import load_parts

STATE, STEP = "state.safetensors", "step.json"
OBJECTIVE = "preference"


class TrainContext(Protocol):
    """Surroundings of a training rank: its number, its checkpoints, and whether to stop."""

    rank: int
    world_size: int

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest complete checkpoint."""

    def save_checkpoint(self, step: int, metrics: Metrics, write: Callable[[Path], None]) -> None:
        """Make a checkpoint of what `write` puts into an empty folder. Every rank calls; rank 0 writes."""

    def is_stopping(self) -> bool:
        """True when it is time to save a checkpoint and leave; the same answer on every rank."""


class RewardTrainer:
    """A latent reward under training on one rank."""

    def __init__(self, config: RewardTrainingConfig, family: Family, model: NoisyLatentReward) -> None:
        """family: its VAE and text encoders. model: untrained, float32, on the family's device; what asks for gradients is trained."""
        self.config, self.family = config, family
        self.engine: Engine = build_engine(config.engine, model.train(), config.optimizer, "latent reward")
        self.average = EMA(self.engine, config.ema) if config.ema else None

    @classmethod
    def from_config(cls, config: RewardTrainingConfig, family: Family) -> Self:
        """The teacher's blocks and random projections, which depend on the seed alone. The teacher itself is not kept."""
        teacher = load_parts(config.model, ("denoiser",)).to(family.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = latent_reward_of(teacher, config.latent_reward.blocks)
        choose_trained(model, config.latent_reward.train)
        if config.engine.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
        return cls(config, family, model)

    def step(self, step: int, pairs: Pairs, indices: Tensor) -> Metrics:
        """One update from this rank's pairs. indices: their places in the global batch, int64 (B,), which name their noise."""
        draw, own = StepRng(self.config.seed, step), indices.to(self.family.device)
        clean = encode_pairs(self.family, pairs.images)
        timesteps = spread_timesteps(draw, self.config.batch, self.config.timestep_range)[indices].to(own.device)
        labels = pairs.labels.to(own.device)
        loss, right, judged = 0.0, 0, 0
        for rows in self.engine.micro_batches(len(indices)):
            noisy = noised(self.family, clean[rows], timesteps[rows], own[rows], draw.seed("noise"), self.config.noise)
            objective, rewards = self.loss(noisy, timesteps[rows], pairs.texts[rows], labels[rows])
            loss += self.engine.backward(objective).item()
            decided = labels[rows] != 0.5
            right += int(((rewards[:, 0] > rewards[:, 1]) == (labels[rows] > 0.5))[decided].sum())
            judged += int(decided.sum())
        optimizer = self.config.optimizer
        norm = self.engine.update(OBJECTIVE, optimizer.model_copy(update={"lr": self.rate(step)}))
        if self.average is not None:
            self.average.update()
        return {"loss": loss, "accuracy": right / max(1, judged), "gradient_norm": norm}

    def loss(self, noisy: Tensor, timesteps: Tensor, texts: tuple[str, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and rewards float32 (B, 2) of noisy pairs float (B, 2, C, h, w)."""
        conditioning = self.family.encode(texts).repeat_interleave(2)
        times = self.family.schedule.network_timestep(timesteps.repeat_interleave(2))
        rewards = self.engine(noisy.flatten(0, 1), times, conditioning).unflatten(0, (-1, 2))
        return pair_loss(rewards, labels), rewards

    def rate(self, step: int) -> float:
        """The learning rate after the warm-up, which is the engine's."""
        optimizer = self.config.optimizer
        if optimizer.schedule == "constant":
            return optimizer.lr
        done = max(0, step - optimizer.warmup) / max(1, self.config.steps - optimizer.warmup)
        return optimizer.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def result(self) -> tuple[NoisyLatentReward, dict[str, Tensor]]:
        """The model as it is now, averaged where that was asked for. Collective.

        Returns it as the engine computes with it, complete and frozen on every rank, and on rank 0 the float32 masters of what was trained.
        """
        with self.average.applied() if self.average is not None else nullcontext():
            model, masters = self.engine.copy(), self.engine.weights()
        assert isinstance(model, NoisyLatentReward)
        if isinstance(model, LatentRewardModel):
            model.network.disable_gradient_checkpointing()
        return model, masters

    # ---- checkpoints

    def write(self, folder: Path, step: int) -> None:
        """Everything an exact resume needs. Collective; rank 0 writes."""
        state = {f"engine/{name}": tensor for name, tensor in self.engine.state_items()}
        if self.average is not None:
            state |= {f"average/{name}": tensor for name, tensor in self.average.state_items()}
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        save_tensors(folder / STATE, state)
        (folder / STEP).write_text(json.dumps({"step": step}))

    def restore(self, folder: Path) -> int:
        """Go on from a checkpoint; returns the steps done. Raises ValueError when it is damaged or of another network."""
        state: Mapping[str, Tensor] = load_tensors(folder / STATE)
        self.engine.load_state(under(state, "engine/"))
        if self.average is not None:
            self.average.load_state(under(state, "average/"))
        return int(json.loads((folder / STEP).read_text())["step"])


def train(trainer: RewardTrainer, pairs: PairFiles, context: TrainContext, note: Callable[[int, Metrics], None]) -> int:
    """Train until done or stopped; returns the steps done, of which there is a checkpoint. note: rank 0 tells it that so many are done."""
    config = trainer.config
    newest = context.newest_checkpoint()
    done = 0 if newest is None else trainer.restore(newest)
    for step in range(done, config.steps):
        indices = torch.arange(config.batch).tensor_split(context.world_size)[context.rank]
        metrics = trainer.step(step, pairs.take(step * config.batch + indices), indices)
        done = step + 1
        if context.rank == 0:
            note(done, metrics)
        stopping = context.is_stopping()
        if stopping or done == config.steps or done % config.checkpoint.every == 0:
            context.save_checkpoint(done, metrics, lambda folder: trainer.write(folder, done))  # noqa: B023 (called at once)
        if stopping:
            break
    return done


def encode_pairs(family: Family, images: Tensor) -> Tensor:
    """Clean latents float32 (B, 2, C, h, w) of pairs of images float (B, 2, 3, H, W) in [-1, 1]."""
    return family.encode_images(images.flatten(0, 1)).unflatten(0, (-1, 2))


def noised(family: Family, clean: Tensor, timesteps: Tensor, indices: Tensor, seed: int, kind: str) -> Tensor:
    """Both latents of each pair at the pair's timestep, float32 (B, 2, C, h, w).

    indices: int64 (B,), which name the noise. kind: "shared", the same for both, or "own".
    """
    shape = clean.shape[2:]
    first = noise(indices, shape, seed, "pair/0")
    second = first if kind == "shared" else noise(indices, shape, seed, "pair/1")
    both = (family.schedule.add_noise(clean[:, i], drawn, timesteps) for i, drawn in enumerate((first, second)))
    return torch.stack(list(both), dim=1)


def pair_rewards(
    family: Family, model: NoisyLatentReward, noisy: Tensor, timesteps: Tensor, texts: Sequence[str]
) -> Tensor:
    """Rewards float32 (B, 2) of noisy pairs."""
    both = [text for text in texts for _ in range(2)]
    return model.score(noisy.flatten(0, 1), timesteps.repeat_interleave(2), both, family).unflatten(0, (-1, 2))


def choose_trained(model: LatentRewardModel, which: str) -> None:
    """Let gradients reach all weights, or those of the last part and the projections."""
    model.requires_grad_(which == "all")
    if which == "last":
        model.get_submodule(model.last_part).requires_grad_(True)
        for projection in (model.visual_projection, model.text_projection):
            if projection is not None:
                projection.requires_grad_(True)
        model.logit_scale.requires_grad_(True)


def spread_timesteps(draw: StepRng, count: int, bounds: tuple[int, int]) -> Tensor:
    """int64 (count,), one from each of `count` equal parts of [lowest, highest]: less variance in the loss than independent draws."""
    low, high = bounds
    generator = torch.Generator().manual_seed(draw.seed("timesteps"))
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return low + (places * (high + 1 - low)).long().clamp(max=high - low)
