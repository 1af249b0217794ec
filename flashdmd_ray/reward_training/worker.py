"""The work of one rank, from loading to the finished model."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import torch

from flashdmd_ray.batch import Metrics
from flashdmd_ray.engine.processes import placed_device
from flashdmd_ray.models.family import Family
from flashdmd_ray.reward_training.accuracy import as_report, count_right
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.pairs import open_pair_data
from flashdmd_ray.reward_training.result import save_result
from flashdmd_ray.reward_training.stem import StemTrainer
from flashdmd_ray.reward_training.training import RewardTrainer, TrainContext, train
from flashdmd_ray.reward_training.verdicts import load_judges
from flashdmd_ray.roles.networks import load_parts
from flashdmd_ray.run.metrics_log import MetricsLog

BAD_PAIRS, METRICS = "bad_pairs.json", "metrics.jsonl"


def load_spaces(config: RewardTrainingConfig) -> Family:
    """The VAE and the text encoders of the model family."""
    return load_parts(config.model, ("vae", "text")).to(placed_device(config.workers.gpus, "workers.gpus"))


def run_worker(config: RewardTrainingConfig, source: str, folder: Path, context: TrainContext) -> None:
    """Train on the pairs at `source`; after the last step measure, and let rank 0 write the model into the run's `folder`."""
    torch.set_num_threads(config.threads)
    family = load_spaces(config)
    data = open_pair_data(config.pairs, source, family.image_size, config.seed)
    trainer = (StemTrainer if config.latent_reward.form == "clip" else RewardTrainer).from_config(config, family)
    with closing(MetricsFile(folder / METRICS)) as metrics:
        done = train(trainer, data.train, context, metrics.write)
    if context.rank == 0:
        report = {**data.tally.as_json(), "damaged": {bad.key: bad.reason for bad in data.train.met}}
        (folder / BAD_PAIRS).write_text(json.dumps(report, indent=1) + "\n")
    if done < config.steps:
        return
    model, masters = trainer.result()
    judges = load_judges(config.rewards, family.device)
    counts = count_right(config, family, model, judges, data.held_out, context.rank, context.world_size)
    if context.rank == 0:
        report = as_report(counts, config.accuracy.timesteps, list(judges))
        save_result(folder, config, model, masters, report, done)


class MetricsFile:
    """Rank 0's record of steps in the run folder, which every process of the job sees."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log: MetricsLog | None = None

    def write(self, step: int, metrics: Metrics) -> None:
        """Append step `step`; records of the same or later steps, of an attempt that was lost, are dropped first."""
        if self._log is None:
            self._log = MetricsLog(self._path, after_step=step - 1)
        self._log.write(step, metrics)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
