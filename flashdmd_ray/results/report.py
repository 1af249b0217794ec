"""What a person looks at when a run has ended: the table, the grid and the export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, read_state
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.engine.processes import local_device
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards import ImageFeatures, PixelReward
from flashdmd_ray.monitor import summary
from flashdmd_ray.results.evaluation import Comparison, Yardstick, as_json, evaluate, print_table
from flashdmd_ray.results.evaluation_data import build_reference, choose_prompts, has_exact_judge
from flashdmd_ray.results.export import CardFacts, export_pipeline
from flashdmd_ray.results.grid import write_grid
from flashdmd_ray.results.sample_grid import COLUMNS
from flashdmd_ray.roles.generator import AVERAGE
from flashdmd_ray.roles.image_sampling import Sampler, sample_all_images, seed_of, student_sampler, teacher_sampler
from flashdmd_ray.roles.networks import load_family, load_student, whole_weights
from flashdmd_ray.roles.reward import load_reward
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.storage import Location, checkpoint_root
from flashdmd_ray.run.tracking import Tracker

EXAMPLES = 3
Say = Callable[[str], None]


def saved_weights(checkpoint: Location) -> dict[str, Tensor]:
    """What the generator trains, as it is judged at a checkpoint, by parameter name: the average where one is kept."""
    state = load_tensors(checkpoint / "generator.safetensors")
    if (checkpoint / AVERAGE).exists():
        state |= load_tensors(checkpoint / AVERAGE)
    return {
        name.partition("/")[2]: tensor for name, tensor in state.items() if name.startswith(("weights/", "buffers/"))
    }


def student_weights(config: Config, family: Family, checkpoint: Location) -> Mapping[str, Tensor]:
    """As `saved_weights`, always of a whole network: a LoRA generator's are merged into the teacher's."""
    return whole_weights(config, family, saved_weights(checkpoint))


def judging_family(config: Config) -> Family:
    """The teacher family where samples are drawn and judged after training: on the GPU that this process sees, else on the CPU."""
    return load_family(config.model, device=local_device())


def report(config: Config, directory: RunDirectory, tracker: Tracker, say: Say) -> None:
    """Measure, draw and export the newest checkpoint of a finished run. `report.json` is written last."""
    checkpoint = latest_checkpoint(checkpoint_root(config, directory.path))
    assert checkpoint is not None, "a finished run has a checkpoint"
    family = judging_family(config)
    weights = student_weights(config, family, checkpoint)
    network = load_student(family, weights)
    texts = choose_prompts(config, COLUMNS, grid_seed(config))

    table = compare(config, family, network, say)
    if table is not None:
        print_table(table)
    say(f"drawing the grid and exporting on {family.device}")
    grid = draw_comparison(config, family, network, texts, directory.path / "grid.png")
    training = read_state(checkpoint)
    verdict = hack_monitor(config, training)
    if verdict is not None:
        say(f"hack monitor: {verdict['message']}")
        tracker.tag("hack_monitor", verdict["message"])
    measured = {"rows": []} if table is None else as_json(table)
    trained = {name: value for name, value in training.items() if name != "monitor"}
    facts = measured | {"seed": config.seed, "training": trained, "hack_monitor": verdict, "grid": texts}
    card = card_facts(config, training, measured, texts)
    export_pipeline(family, weights, config.sampling.timesteps, directory.export, card)
    tracker.image("grid", grid, config.steps)
    tracker.model(directory.export)
    write_atomically(directory.path / "report.json", json.dumps(facts, indent=1) + "\n")
    say(f"table: {directory.path / 'report.json'}   grid: {grid}   pipeline: {directory.export}")


def samplers(config: Config, family: Family, student: Denoiser) -> list[Sampler]:
    """The teacher, the student before any training (the teacher's network as a few-step generator), the student now."""
    few = config.student_timesteps.values()
    return [
        teacher_sampler(family, config.evaluation.teacher_steps, config.teacher_guidance),
        *(student_sampler("before", family, family.teacher, timesteps) for timesteps in few),
        *(student_sampler("student", family, student, timesteps) for timesteps in few),
    ]


def compare(config: Config, family: Family, student: Denoiser, say: Say) -> Comparison | None:
    """The final table; None, with a line that says why, when there is nothing to measure."""
    evaluation = config.evaluation
    if not evaluation.samples:
        say("no table: evaluation.samples is 0")
        return None
    yardstick = build_yardstick(config, family)
    if yardstick is None:
        say(
            "no table: nothing judges these images; configure a reward of images, with held_out: true to leave it out of training"
        )
        return None
    seed = derive_seed(config.seed, "evaluation")
    reference = build_reference(config, family.image_size, seed)
    say(f"comparing teacher and student on {evaluation.samples} {reference.prompts}, on {family.device}")
    chosen = samplers(config, family, student)
    return evaluate(family, chosen, reference, yardstick, seed, evaluation.batch, say)


def build_yardstick(config: Config, family: Family) -> Yardstick | None:
    """What this run's samples are measured by: for held-out digit scenes their exact judge, for other data the image features of the
    first pixel reward that has such; and every pixel reward. None without any of them."""
    exact = has_exact_judge(config)
    configured = pixel_rewards(config) or ([RewardConfig(kind="pickscore")] if exact else [])
    if not configured:
        return None
    rewards = {}
    for reward in configured:
        model = load_reward(reward)
        assert isinstance(model, PixelReward)
        rewards[reward.label] = model.to(family.device)
    optimised = [label for label in config.optimised_rewards if label in rewards]
    if exact:
        judge = PromptChecker.load()
        return Yardstick(
            "features of a network that judges digit scenes", judge.features, judge.correct, rewards, optimised
        )
    for label, model in rewards.items():
        if isinstance(model, ImageFeatures):
            return Yardstick(f"image embeddings of {label}", model.features, None, rewards, optimised)
    return Yardstick(rewards=rewards, optimised=optimised)


def pixel_rewards(config: Config) -> list[RewardConfig]:
    """The configured rewards that look at images. The packaged one knows digit scenes only: with another teacher it is left out, unless
    training optimises it."""
    optimised = config.optimised_rewards
    knows = config.model.teacher == "demo"
    return [r for r in config.rewards if r.reads_images and (knows or r.path != "demo" or r.label in optimised)]


def hack_monitor(config: Config, training: Mapping[str, Any]) -> dict[str, Any] | None:
    """The monitor's summary of the training behind a checkpoint; None when the monitor was off, as in runs that are older than it.

    training: the checkpoint's state."""
    return summary(training["monitor"]) if config.monitor_enabled and "monitor" in training else None


def grid_seed(config: Config) -> int:
    """Of the noise of the final grid."""
    return derive_seed(config.seed, "grid")


def draw_comparison(config: Config, family: Family, student: Denoiser, texts: Sequence[str], path: Path) -> Path:
    """One column per prompt, one row per sampler, most forwards first."""
    teacher, *few = samplers(config, family, student)
    longest = max(sampler.nfe for sampler in few)
    chosen = [teacher] + [s for s in few if s.name.startswith("before") and s.nfe == longest]
    chosen += sorted((s for s in few if s.name.startswith("student")), key=lambda s: -s.nfe)
    indices, seed, batch = range(len(texts)), grid_seed(config), config.evaluation.batch
    rows = [(s.name, sample_all_images(family, s, texts, indices, seed, batch)) for s in chosen]
    return write_grid(path, rows, texts)


def card_facts(
    config: Config, training: Mapping[str, Any], measured: Mapping[str, Any], texts: Sequence[str]
) -> CardFacts:
    """What the model card says about the training. measured: the table as JSON values. texts: the prompts of the run's grid, whose first
    columns are the card's examples."""
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
