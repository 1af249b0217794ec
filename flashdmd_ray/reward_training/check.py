"""Everything about a latent reward's training that can be known to be wrong before it begins. Loads nothing."""

from __future__ import annotations

from flashdmd_ray.config import Config
from flashdmd_ray.data.datasets import check_prompts
from flashdmd_ray.models.demo_parts import demo_rewards, is_demo_world
from flashdmd_ray.reward_training.config import DRAWN, PairsConfig, RewardTrainingConfig
from flashdmd_ray.run.folder import read_run_config
from flashdmd_ray.run.storage import Location


def check_pairs(config: RewardTrainingConfig) -> None:
    """Raises ValueError, one line for each fault, for pairs, prompts, rewards or a student that cannot be used."""
    pairs, lines = config.pairs, []
    if not is_demo_world(config):
        lines = demo_rewards(config)
        if pairs.source == "demo":
            lines.append(
                "pairs.source: the packaged digit scenes are pictures of the demo's 24-pixel world; name labelled pairs, "
                "or let the 'teacher' draw them"
            )
        if pairs.source in DRAWN and pairs.prompts is None:
            lines.append("pairs.prompts: null takes the captions of the demo's digit scenes; name a file of prompts")
    if lines:
        raise ValueError("\n".join(lines))
    if pairs.prompts is not None:
        check_prompts("pairs.prompts", pairs.prompts, pairs.max_bad_fraction, "pairs.max_bad_fraction")
    if pairs.run is not None:
        find_drawing_student(pairs, config.model.family)


def find_drawing_student(config: PairsConfig, family: str) -> tuple[Config, Location]:
    """The run at `pairs.run`, and its export or newest checkpoint. Raises ValueError when it has none, or is of another family."""
    from flashdmd_ray.results.student import find_student

    assert config.run is not None, "the configuration refuses a student without a run"
    run = read_run_config(config.run)
    if run.model.family != family:
        raise ValueError(f"pairs.run: {config.run} trained family '{run.model.family}', this is '{family}'")
    return run, find_student(config.run, run)
