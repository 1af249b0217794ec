"""The parts that roles of one process share: the teacher family, trained networks and their files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flashdmd_ray.batch import Prompts, noise
from flashdmd_ray.checkpoint import PartFile, Saved, save_part, save_tensors
from flashdmd_ray.config import Config, ModelConfig, OptimizerConfig
from flashdmd_ray.data.precomputed import use_embeddings
from flashdmd_ray.diffusion.sampling import PredictX0
from flashdmd_ray.diffusion.schedule import NoiseSchedule
from flashdmd_ray.engine import Engine, build_engine, in_turn, skeleton, world_size
from flashdmd_ray.engine.processes import placed_device
from flashdmd_ray.models import family_class
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import PARTS, Family
from flashdmd_ray.models.start_weights import load_start
from flashdmd_ray.run.messages import one_line

NetworkName = Literal["generator", "score"]


def group_device(config: Config, group: str) -> torch.device:
    """Device of a worker group's networks, as `placement.<group>.gpus` says. Raises ValueError when torch sees no GPU."""
    return placed_device(config.placement.of(group).gpus, f"{config.placement.key(group)}.gpus")


def load_family(model: ModelConfig, parts: Collection[str] = PARTS, device: torch.device | str = "cpu") -> Family:
    """The frozen teacher family, one object per process and device that its roles share: a part is loaded when the first role needs it."""
    return _shared_family(model, torch.device(device)).load(parts)


@lru_cache(maxsize=2)
def _shared_family(model: ModelConfig, device: torch.device) -> Family:
    return load_parts(model, ()).to(device)


def group_family(config: Config, group: str, parts: Collection[str] = PARTS) -> Family:
    """The family of a worker group's roles, on the group's device; it looks prompts up in `data.embeddings` before it encodes them.

    Ranks with GPUs load one after the other: host memory holds one copy. Raises ValueError when those embeddings were made for something
    else.
    """
    device = group_device(config, group)
    with nullcontext() if device.type == "cpu" else in_turn():
        family = load_family(config.model, parts, device)
    if "text" in parts:
        use_embeddings(family, config.data, config.model)
    return family


def load_parts(model: ModelConfig, parts: Collection[str]) -> Family:
    """Some parts of the teacher family, for work before a run."""
    return family_class(model.family).from_config(model, parts)


def trained_network(config: Config, family: Family, role: NetworkName) -> Denoiser:
    """Build the network a role starts from: a whole float32 network with the weights of the teacher's files, or an adapter that changes
    nothing yet.

    A generator with `generator.start` has that student's weights. Raises ValueError for an unusable `lora.targets` or start.
    """
    if role in config.lora.networks:
        return AdaptedDenoiser(family.teacher, config.lora, config.seed, config.engine.gradient_checkpointing)
    network = family.denoiser(gradient_checkpointing=config.engine.gradient_checkpointing)
    if role == "generator" and config.generator.start is not None:
        network.network.load_state_dict(load_start(family, config.generator.start))
    else:
        network.load_state_dict(family.file_weights())
    return network


def trained_engine(config: Config, family: Family, role: NetworkName, settings: OptimizerConfig, name: str) -> Engine:
    """The engine that trains a role from where `trained_network` starts.

    Ranks of ZeRO stage 3 never hold a whole float32 network: they get the teacher's weights one parameter at a time.
    """
    sharded = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3 and world_size() > 1
    if not sharded or role in config.lora.networks:
        return build_engine(config.engine, trained_network(config, family, role), settings, role=name)
    network = skeleton(family.teacher).requires_grad_(True).train()
    assert isinstance(network, Denoiser)
    if config.engine.gradient_checkpointing:
        network.network.enable_gradient_checkpointing()
    start = config.generator.start if role == "generator" else None
    state = family.file_weights() if start is None else trained_network(config, family, role).state_dict()
    return build_engine(config.engine, network, settings, role=name, source=state)


def load_student(family: Family, weights: Mapping[str, Tensor]) -> Denoiser:
    """A whole network around `weights`, those of `whole_weights`: not copied where they are float32, aligned and on the family's device.

    Frozen, on that device. Raises ValueError when they do not fit.
    """
    network = skeleton(family.teacher)
    assert isinstance(network, Denoiser)
    values = {name: _aligned(tensor.to(family.device, torch.float32)) for name, tensor in weights.items()}
    return _frozen(network, values, f"the denoiser of {family.path}", assign=True)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as torch allocates it. Weights in a file may lie anywhere, and some CPUs' kernels then round otherwise."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def student_network(config: Config, family: Family, weights: Mapping[str, Tensor]) -> Denoiser:
    """The generator as it is trained, with `weights` (`Generator.weights`), frozen. Raises ValueError when they are of another network."""
    network = trained_network(config, family, "generator")
    return _frozen(network, weights, f"the generator of this configuration on {family.path}")


def _frozen(network: Denoiser, weights: Mapping[str, Tensor], name: str, assign: bool = False) -> Denoiser:
    try:
        network.load_state_dict(dict(weights), assign=assign)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {name}: {one_line(error)}") from None
    return network.requires_grad_(False).eval()


def whole_weights(config: Config, family: Family, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`weights` of the generator as those of a network without adapters: float32, merged into the teacher's where they are LoRA."""
    if "generator" not in config.lora.networks:
        return weights
    adapted = student_network(config, family, weights)
    assert isinstance(adapted, AdaptedDenoiser)
    return adapted.merge_into(family.denoiser()).state_dict()


class TrainedRole(Saved):
    """Base of the roles that train a network with an engine."""

    def __init__(self, config: Config, family: Family, engine: Engine) -> None:
        self.config = config
        self.family = family
        self.schedule = family.schedule
        self.engine = engine

    @property
    def device(self) -> torch.device:
        """Device of its networks."""
        return self.family.device


def x0_predictor(network: Callable[..., Tensor], schedule: NoiseSchedule, conditioning: Conditioning) -> PredictX0:
    """Bind a network to its prompts: (noisy latents, timesteps) -> x0."""

    def predict_x0(noisy: Tensor, timesteps: Tensor) -> Tensor:
        prediction = network(noisy, schedule.network_timestep(timesteps), conditioning)
        return schedule.to_x0(prediction, noisy, timesteps)

    return predict_x0


def without_grad(predict_x0: PredictX0) -> PredictX0:
    """Make the same prediction outside autograd."""

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return predict_x0(noisy, timesteps)

    return predict


def prompt_noise(prompts: Prompts, shape: tuple[int, ...], seed: int, stream: str) -> Callable[[int], Tensor]:
    """Noise sampler of these prompts: k -> the k-th fresh noise, float32 (B, *shape)."""
    return lambda k: noise(prompts.indices, shape, seed, f"{stream}/{k}")


def save_shared(path: Path | PartFile, tensors: Mapping[str, Tensor]) -> None:
    """Write what all ranks of a group hold alike: rank 0 does. The values are taken now, whenever they are written."""
    if is_first_rank():
        _save(path, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})


def save_engine(path: Path | PartFile, engine: Engine) -> None:
    """Write the state of an engine: every rank calls, rank 0 writes. What `Engine.state` returns is not copied again."""
    state = engine.state()
    if is_first_rank():
        _save(path, state)


def is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _save(path: Path | PartFile, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(path, PartFile):
        save_part(path, tensors)
    else:
        save_tensors(path, tensors)
