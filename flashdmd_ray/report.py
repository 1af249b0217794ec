"""What a person looks at: sample sheets while training; the table, the grid and the export at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, read_state
from flashdmd_ray.config import Config
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.evaluation import (
    Row,
    Sampler,
    as_records,
    demo_held_out,
    evaluate,
    print_table,
    sample_images,
    seed_of,
    student_sampler,
    teacher_sampler,
)
from flashdmd_ray.export import CardFacts, export_pipeline, load_student
from flashdmd_ray.grid import write_grid
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards import PixelReward, build_reward
from flashdmd_ray.roles.generator import AVERAGE
from flashdmd_ray.roles.networks import load_family, resolve, student, whole_weights
from flashdmd_ray.run_directory import RunDirectory, write_atomically
from flashdmd_ray.storage import Location, checkpoint_root
from flashdmd_ray.tracking import Tracker

SHEET_COLUMNS = 10
EXAMPLES = 3
Say = Callable[[str], None]


class SampleSheet:
    """The same held-out prompts and noise again and again: the teacher's row above the student's."""

    def __init__(self, config: Config, family: Family):
        self.config = config
        self.family = family
        self.seed = derive_seed(config.seed, "sheet")
        self.texts = demo_held_out(SHEET_COLUMNS, self.seed).texts
        self._teacher_row: tuple[str, Tensor] | None = None

    def write(self, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Draw the sheet for these weights of the generator (`Generator.evaluation_weights`)."""
        if self._teacher_row is None:
            evaluation = self.config.evaluation
            self._teacher_row = self._row(
                teacher_sampler(self.family, evaluation.teacher_steps, evaluation.guidance_scale)
            )
        network = student(self.config, self.family, weights)
        sampler = student_sampler("student", self.family, network, self.config.sampling.timesteps)
        return write_grid(path, [self._teacher_row, self._row(sampler)], self.texts)

    def _row(self, sampler: Sampler) -> tuple[str, Tensor]:
        return sampler.name, draw_samples(self.family, sampler, self.texts, self.seed)


def saved_weights(checkpoint: Location) -> dict[str, Tensor]:
    """`Generator.evaluation_weights` at a checkpoint, by parameter name."""
    state = load_tensors(checkpoint / "generator.safetensors")
    if (checkpoint / AVERAGE).exists():
        state |= load_tensors(checkpoint / AVERAGE)
    return {
        name.partition("/")[2]: tensor for name, tensor in state.items() if name.startswith(("weights/", "buffers/"))
    }


def student_weights(config: Config, family: Family, checkpoint: Location) -> Mapping[str, Tensor]:
    """As `saved_weights`, always of a whole network: a LoRA generator's are merged into the teacher's."""
    return whole_weights(config, family, saved_weights(checkpoint))


def report(config: Config, directory: RunDirectory, tracker: Tracker, say: Say) -> None:
    """Measure, draw and export the newest checkpoint of a finished run. `report.json` is written last."""
    checkpoint = latest_checkpoint(checkpoint_root(config, directory.path))
    assert checkpoint is not None, "a finished run has a checkpoint"
    family = load_family(config.model)
    weights = student_weights(config, family, checkpoint)
    network = load_student(family, weights)

    say(f"comparing teacher and student on {config.evaluation.samples} held-out prompts")
    rows = measure(config, family, network, say)
    print_table(rows)
    grid = draw_comparison(config, family, network, directory.path / "grid.png")
    training = read_state(checkpoint)
    facts = {"rows": as_records(rows), "seed": config.seed, "training": training}
    export_pipeline(family, weights, config.sampling.timesteps, directory.export, card_facts(config, training, rows))
    tracker.image("grid", grid, config.steps)
    tracker.model(directory.export)
    write_atomically(directory.path / "report.json", json.dumps(facts, indent=1) + "\n")
    say(f"table: {directory.path / 'report.json'}   grid: {grid}   pipeline: {directory.export}")


def samplers(config: Config, family: Family, student: Denoiser) -> list[Sampler]:
    """The teacher, the student before any training (the teacher's network as a few-step generator), the student now."""
    evaluation = config.evaluation
    few = config.student_timesteps.values()
    return [
        teacher_sampler(family, evaluation.teacher_steps, evaluation.guidance_scale),
        *(student_sampler("before", family, family.teacher, timesteps) for timesteps in few),
        *(student_sampler("student", family, student, timesteps) for timesteps in few),
    ]


def measure(config: Config, family: Family, student: Denoiser, say: Say) -> list[Row]:
    """The final table, on held-out captions and noise."""
    evaluation = config.evaluation
    seed = derive_seed(config.seed, "evaluation")
    judge = PromptChecker.load()
    reward = build_reward("pickscore", resolve("demo", "reward"))
    assert isinstance(reward, PixelReward)
    held_out = demo_held_out(evaluation.samples, seed)
    return evaluate(family, samplers(config, family, student), held_out, judge, reward, seed, evaluation.batch, say)


def draw_comparison(config: Config, family: Family, student: Denoiser, path: Path) -> Path:
    """One column per held-out prompt, one row per sampler, most forwards first."""
    seed = derive_seed(config.seed, "grid")
    held_out = demo_held_out(SHEET_COLUMNS, seed)
    teacher, *few = samplers(config, family, student)
    longest = max(sampler.nfe for sampler in few)
    chosen = [teacher] + [s for s in few if s.name.startswith("before") and s.nfe == longest]
    chosen += sorted((s for s in few if s.name.startswith("student")), key=lambda s: -s.nfe)
    rows = [(s.name, draw_samples(family, s, held_out.texts, seed)) for s in chosen]
    return write_grid(path, rows, held_out.texts)


def draw_samples(family: Family, sampler: Sampler, texts: Sequence[str], seed: int) -> Tensor:
    """One image per text, float32 (N, 3, H, W) in [-1, 1]."""
    return torch.cat(list(sample_images(family, sampler, texts, range(len(texts)), seed, len(texts))))


def card_facts(config: Config, training: Mapping[str, Any], rows: Sequence[Row]) -> CardFacts:
    """What the model card says about the training. Its examples are the first columns of the run's grid."""
    grid_seed = derive_seed(config.seed, "grid")
    texts = demo_held_out(SHEET_COLUMNS, grid_seed).texts[:EXAMPLES]
    counters = {name.replace("_", " "): value for name, value in training["counters"].items()}
    return CardFacts(
        name=f"flashdmd_ray {config.run.name}",
        base=config.model.teacher if config.model.teacher != "demo" else "digit-scenes teacher of flashdmd_ray",
        licence="apache-2.0" if config.model.teacher == "demo" else "other",
        cost=counters | {"batch": config.batch, "TTUR": config.ttur, "seconds": round(training["seconds"])},
        optimised_rewards=[r.label for r in config.rewards if r.weight] if config.preference.updates else [],
        measured=as_records(rows),
        examples=[(text, seed_of(grid_seed, index)) for index, text in enumerate(texts)],
    )
