"""The table of teacher and student: which samplers are compared, and what measures them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.engine.processes import local_device
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards import ImageFeatures, PixelReward
from flashdmd_ray.results.evaluation import Comparison, EvalMetrics, evaluate
from flashdmd_ray.results.evaluation_data import build_reference, has_exact_judge
from flashdmd_ray.roles.image_sampling import Sampler, student_sampler, teacher_sampler
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.roles.reward import load_reward

Say = Callable[[str], None]


def judging_family(config: Config) -> Family:
    """The teacher family for sampling and judging after training: on the GPU that this process sees, else on the CPU.

    Sets torch's threads in this process, on which the last digits of sums depend, as they are in training.
    """
    torch.set_num_threads(config.placement.threads)
    return load_family(config.model, device=local_device())


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
    eval_metrics = build_eval_metrics(config, family)
    if eval_metrics is None:
        say(
            "no table: nothing judges these images; configure a reward of images, with held_out: true to leave it out of training"
        )
        return None
    seed = derive_seed(config.seed, "evaluation")
    reference = build_reference(config, family.image_size, seed)
    say(f"comparing teacher and student on {evaluation.samples} {reference.prompts}, on {family.device}")
    return evaluate(family, samplers(config, family, student), reference, eval_metrics, seed, evaluation.batch, say)


def build_eval_metrics(config: Config, family: Family) -> EvalMetrics | None:
    """Metrics of this run's samples, None when nothing can judge them.

    Every pixel reward, and a space of features for distances: for held-out digit scenes that of their exact judge, for other data the
    image features of the first pixel reward that has such.
    """
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
        return EvalMetrics(
            "features of a network that judges digit scenes", judge.features, judge.correct, rewards, optimised
        )
    for label, model in rewards.items():
        if isinstance(model, ImageFeatures):
            return EvalMetrics(f"image embeddings of {label}", model.features, None, rewards, optimised)
    return EvalMetrics(rewards=rewards, optimised=optimised)


def pixel_rewards(config: Config) -> list[RewardConfig]:
    """The configured rewards that look at images.

    The packaged one knows digit scenes only: with another teacher it is left out, unless training optimises it.
    """
    optimised = config.optimised_rewards
    knows = config.model.teacher == "demo"
    return [r for r in config.rewards if r.reads_images and (knows or r.path != "demo" or r.label in optimised)]
