"""The student of a run: its weights in a checkpoint or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors
from flashdmd_ray.config import Config
from flashdmd_ray.models import family_class
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.results.export_facts import FACTS
from flashdmd_ray.roles.generator import AVERAGE
from flashdmd_ray.roles.networks import load_student, student_network, whole_weights
from flashdmd_ray.run.storage import Location, checkpoint_root


def saved_weights(checkpoint: Location) -> dict[str, Tensor]:
    """Weights that the generator trains, at a checkpoint, by parameter name: their average where one is kept."""
    state = load_tensors(checkpoint / "generator.safetensors")
    if (checkpoint / AVERAGE).exists():
        state |= load_tensors(checkpoint / AVERAGE)
    return {
        name.partition("/")[2]: tensor for name, tensor in state.items() if name.startswith(("weights/", "buffers/"))
    }


def student_weights(config: Config, family: Family, checkpoint: Location) -> Mapping[str, Tensor]:
    """Weights of the whole student at a checkpoint: those of a LoRA generator are merged into the teacher's."""
    return whole_weights(config, family, saved_weights(checkpoint))


def student_as_trained(config: Config, family: Family, saved: Mapping[str, Tensor]) -> Denoiser:
    """The network of `saved_weights`, frozen: whole, or with LoRA an adapter on the teacher's weights, which are not copied."""
    if "generator" in config.lora.networks:
        return student_network(config, family, saved)
    return load_student(family, saved)


def find_student(run: Path, config: Config) -> Location:
    """The run's export, or its newest complete checkpoint while it has none. Raises ValueError when it has neither."""
    if (run / "export" / FACTS).is_file():
        return run / "export"
    checkpoint = latest_checkpoint(checkpoint_root(config, run))
    if checkpoint is None:
        raise ValueError(f"{run} has neither an export nor a complete checkpoint: train it to its first one")
    return checkpoint


def read_student(source: Location, config: Config, family: Family) -> Mapping[str, Tensor]:
    """The student's whole weights in an export or a checkpoint. Raises ValueError when they are damaged."""
    if (source / FACTS).exists():
        return family_class(config.model.family).from_pretrained(str(source), parts=["denoiser"]).teacher.state_dict()
    return student_weights(config, family, source)
