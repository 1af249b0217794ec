"""The results of a finished run: the table, the picture grid, the page that shows both, and the export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.checkpoint import latest_checkpoint, read_state
from flashdmd_ray.config import Config
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.monitor import summary
from flashdmd_ray.results.comparison import Say, compare, judging_family, samplers
from flashdmd_ray.results.evaluation import as_json, print_table
from flashdmd_ray.results.evaluation_data import choose_prompts
from flashdmd_ray.results.export import export_pipeline
from flashdmd_ray.results.grid import write_grid
from flashdmd_ray.results.model_card import CardFacts
from flashdmd_ray.results.run_page import PAGE, REPORT, FinishedRun, write_run_page
from flashdmd_ray.results.sample_grid import COLUMNS
from flashdmd_ray.results.student import saved_weights, student_as_trained
from flashdmd_ray.roles.image_sampling import sample_all_images, seed_of
from flashdmd_ray.roles.networks import load_family, whole_weights
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.storage import checkpoint_root
from flashdmd_ray.run.tracking import Tracker

EXAMPLES = 3


def report(config: Config, directory: RunDirectory, tracker: Tracker, say: Say) -> None:
    """Measure, picture and export the newest checkpoint of a finished run. `report.json` is written last."""
    checkpoint = latest_checkpoint(checkpoint_root(config, directory.path))
    assert checkpoint is not None, "a finished run has a checkpoint"
    say("loading the teacher, the student and what judges their images")
    family = judging_family(config)
    saved = saved_weights(checkpoint)
    network = student_as_trained(config, family, saved)
    texts = choose_prompts(config, COLUMNS, grid_seed(config))

    table = compare(config, family, network, say)
    if table is not None:
        print_table(table)
    say(f"generating the grid on {family.device}, then exporting")
    grid = write_comparison(config, family, network, texts, directory.path / "grid.png")
    training = read_state(checkpoint)
    verdict = hack_monitor(config, training)
    if verdict is not None:
        say(f"hack monitor: {verdict['message']}")
        tracker.tag("hack_monitor", verdict["message"])
    measured = {"rows": []} if table is None else as_json(table)
    trained = {name: value for name, value in training.items() if name != "monitor"}
    facts = measured | {"seed": config.seed, "training": trained, "hack_monitor": verdict, "grid": texts}
    card = card_facts(config, training, measured, texts)
    whole = load_family(
        config.model
    )  # on the CPU: a GPU may have no room for a whole float32 network beside the teacher
    export_pipeline(whole, whole_weights(config, whole, saved), config.sampling.timesteps, directory.export, card)
    page = write_run_page([FinishedRun(directory.path, facts)], directory.path / PAGE)
    tracker.image("grid", grid, config.steps)
    tracker.file(page)
    tracker.model(directory.export)
    write_atomically(directory.path / REPORT, json.dumps(facts, indent=1) + "\n")
    say(f"report: {page}   grid: {grid}   pipeline: {directory.export}")


def hack_monitor(config: Config, training: Mapping[str, Any]) -> dict[str, Any] | None:
    """The monitor's summary of the training behind a checkpoint; None when the monitor was off, as in runs that are older than it.

    training: the checkpoint's state."""
    return summary(training["monitor"]) if config.monitor_enabled and "monitor" in training else None


def grid_seed(config: Config) -> int:
    """Seed of the final grid's noise."""
    return derive_seed(config.seed, "grid")


def write_comparison(config: Config, family: Family, student: Denoiser, texts: Sequence[str], path: Path) -> Path:
    """Write the final grid: one column per prompt, one row per sampler, most forwards first; returns its path."""
    teacher, *few = samplers(config, family, student)
    longest = max(sampler.nfe for sampler in few)
    compared = [teacher] + [s for s in few if s.name.startswith("before") and s.nfe == longest]
    compared += sorted((s for s in few if s.name.startswith("student")), key=lambda s: -s.nfe)
    indices, seed, batch = range(len(texts)), grid_seed(config), config.evaluation.batch
    rows = [(s.name, sample_all_images(family, s, texts, indices, seed, batch)) for s in compared]
    return write_grid(path, rows, texts)


def card_facts(
    config: Config, training: Mapping[str, Any], measured: Mapping[str, Any], texts: Sequence[str]
) -> CardFacts:
    """Facts of the model card about the training.

    training: the checkpoint's state. measured: the table as JSON values. texts: the prompts of the run's grid, whose first columns are
    the card's examples.
    """
    verdict = hack_monitor(config, training)
    counters = {name.replace("_", " "): value for name, value in training["counters"].items()}
    return CardFacts(
        name=f"flashdmd_ray {config.run.name}",
        base=config.model.teacher if config.model.teacher != "demo" else "digit-scenes teacher of flashdmd_ray",
        licence="apache-2.0" if config.model.teacher == "demo" else "other",
        cost=counters | {"batch": config.batch, "TTUR": config.ttur, "seconds": round(training["seconds"])},
        optimised_rewards=config.optimised_rewards,
        hack_monitor=None if verdict is None else verdict["message"],
        measured=measured,
        examples=[(text, seed_of(grid_seed(config), index)) for index, text in enumerate(texts[:EXAMPLES])],
    )
