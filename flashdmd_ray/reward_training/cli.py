"""The command line of latent reward training.

Exit codes: 0 done, 1 the run failed, 2 the configuration or a file it names is wrong, 130 and 143 after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from textwrap import indent

from flashdmd_ray.config import dump_changes, load_as
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.models.teacher_files import teacher_files
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.reward_training.check import check_pairs
from flashdmd_ray.reward_training.config import DRAWN, RewardTrainingConfig
from flashdmd_ray.run.command_line import prepare_process, refuse, run_training, training_parser
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.lock import check_free
from flashdmd_ray.run.variables import check_ray_address


def train_latent_reward_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd reward train [CONFIG] [--set key=value ...] [--dry-run]`; returns the exit code."""
    prepare_process()
    options = training_parser(
        "flashdmd reward train",
        "Train a latent reward model on labelled pairs of images, or on the verdicts of pixel rewards, and measure it.",
        "`flashdmd config KEY` explains a key; see docs/latent_rewards.md.",
        "say what would be done",
        "latent_reward_demo",
    ).parse_args(arguments)
    try:
        config = load_as(RewardTrainingConfig, options.config, options.set)
        run = RunDirectory.check(config.run, config)
        plan = describe(config, run)
    except ValueError as error:
        return refuse(error)
    print("\n".join(plan), flush=True)
    print(f"settings that differ from the defaults\n{indent(dump_changes(config), '  ')}", flush=True)
    if options.dry_run:
        return 0
    return run_training(lambda: _train(config, run), run)


def _train(config: RewardTrainingConfig, run: RunDirectory) -> int:
    check_free(run.path)
    if config.runtime == "ray":
        check_ray_address(os.environ)
    from flashdmd_ray.reward_training.job import run_reward_training

    return run_reward_training(config)


def describe(config: RewardTrainingConfig, run: RunDirectory) -> list[str]:
    """The plan of a job, in a few lines; loads nothing. Raises ValueError for models or pairs that are not there."""
    teacher = teacher_files(config)
    check_pairs(config)
    judges = reward_files(config)
    try_loading(config, config.rewards)
    pairs, model, optimizer = config.pairs, config.latent_reward, config.optimizer
    part = {"all": "every kept weight", "last": "the last part and the projections"}[model.train]
    size = f", {teacher.total:,} parameters with VAE and text encoders" if teacher.total else ""
    names = ", ".join(f"{label} ({files.source})" for label, files in judges.items()) or "none"
    return [
        f"latent reward   of {config.model.family}, made of {teacher.source}{size}; trains {part}",
        f"pairs           {_pairs(config)}",
        f"labels          {'those of the source' if pairs.labels == 'given' else 'the verdicts of the pixel rewards'}",
        f"pixel rewards   {names}",
        f"training        {config.steps:,} updates of {config.batch} pairs, {config.engine.kind}, {config.engine.precision}",
        f"learning rate   {optimizer.lr:g}, {optimizer.schedule} after {optimizer.warmup} of warm-up; weights' average {config.ema:g}",
        f"workers         {_workers(config)}",
        f"measured        at t = {', '.join(map(str, config.accuracy.timesteps))} on up to {config.accuracy.pairs:,} held-out pairs",
        f"result          {run.path / 'latent_reward'}: rewards: [{{kind: latent, path: {run.path / 'latent_reward'}}}]",
    ]


def _pairs(config: RewardTrainingConfig) -> str:
    pairs = config.pairs
    if pairs.source == "demo":
        return f"{pairs.count:,} of digit scenes, composed into the run folder; held-out scenes beside them"
    if pairs.source in DRAWN:
        return f"{pairs.count:,} drawn by the {pairs.source} into the run folder; {pairs.held_out:.0%} of the prompts held out"
    from flashdmd_ray.data.formats.pairs import open_pairs

    return f"{pairs.source} ({open_pairs(pairs.source).kind}); {pairs.held_out:.0%} of the prompts held out"


def _workers(config: RewardTrainingConfig) -> str:
    if config.runtime == "local":
        return "one process, no Ray"
    group = config.workers
    each = f"{group.gpus:g} GPU" if group.gpus else f"{group.cpus:g} CPU"
    again = f"after a loss training goes on, up to {config.deadlines.attempts - 1} times"
    return f"{group.workers} under Ray Train, {each} each; {again}"
