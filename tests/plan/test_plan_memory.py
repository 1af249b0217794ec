"""The plan's bytes as closed forms, the refusal of what does not fit, and the shipped configurations."""

import pytest

from flashdmd_ray import plan
from flashdmd_ray.config import load_config, parse_config
from flashdmd_ray.plan import fit
from flashdmd_ray.plan.forecast import forecast_of
from flashdmd_ray.plan.hardware import GPUS
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import Model, Models, models_of
from flashdmd_ray.plan.parts import BUCKET, parts_of_models

N = 1000
UNKNOWN_NETWORKS = Models(
    denoiser=Model("a teacher", parameters=N),
    vae=Model("a teacher", parameters=10),
    texts=(Model("a teacher", parameters=5),),
    sam=Model("a sam", parameters=7),
    rewards={"pickscore": Model("a clip", parameters=3), "latent": Model("a U-Net", parameters=2)},
    latent=None,
    image=None,
)


def held(settings, name="generator"):
    tree = {"preference": {"updates": 0}, "placement": {"learner": {"workers": 2}}, **settings}
    (part,) = [part for part in parts_of_models(parse_config(tree), UNKNOWN_NETWORKS) if part.name == name]
    return tuple(size / N for size in (part.held.weights, part.held.gradients, part.held.optimizer, part.held.host))


# Bytes per parameter on one of two ranks: weights, gradients, optimizer, host. Sent in one bucket, which holds all of so small a network.
@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({}, (4, 4, 8, 0)),  # float32 weights are the masters
        ({"precision": "bfloat16"}, (2, 4, 4 + 8, 0)),
        ({"offload_optimizer": True}, (4, 4, 0, 4 + 8)),
        ({"optimizer": "adamw_8bit"}, (4, 4, 2 + 8 / 256, 0)),
        ({"kind": "deepspeed"}, (4, 4 + 4 / 2 + 4, (4 + 8) / 2, 0)),
        ({"kind": "deepspeed", "precision": "bfloat16", "zero_stage": 2}, (2, 4 / 2 + 2, (4 + 8) / 2, 0)),
        ({"kind": "deepspeed", "precision": "bfloat16", "zero_stage": 3}, (2 / 2 + 2, 4 / 2 + 2, (4 + 8) / 2, 0)),
        ({"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True}, (4, 4 / 2 + 4, 0, (4 + 8) / 2)),
    ],
)
def test_bytes_of_training_follow_engine_and_ranks(engine, expected):
    assert N < BUCKET
    assert held({"engine": engine}) == pytest.approx(expected)


def test_preferences_add_moments_and_a_reference_and_the_average_a_copy():
    assert held({"preference": {"updates": 1}}) == (4, 4, 16, 0)
    assert held({"preference": {"updates": 1}}, "reference policy") == (4, 0, 0, 0)
    assert held({"evaluation": {"ema": 0.9}}) == (4, 4, 8 + 4, 0)
    assert held({"model": {"dtype": "bfloat16"}}, "teacher") == (2, 0, 0, 0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run folders of the checkout must not matter."""
    monkeypatch.chdir(tmp_path)


def demo_on_gpus(gib, **settings):
    placement = {
        group: {"gpus": 1, "gpu_memory_gib": gib} for group in ("learner", "discriminator", "rollout", "reward")
    }
    tree = load_config().model_dump(mode="json") | {"placement": placement} | settings
    return parse_config(tree)


def learner_gib(config):
    models = models_of(config)
    parts = parts_of_models(config, models)
    return fit.processes(config, parts, step_of(config, models))["learner"].gpu_gib


def test_a_plan_that_cannot_fit_is_refused_with_the_settings_that_would_do():
    needed = learner_gib(demo_on_gpus(100.0))
    plan.check(demo_on_gpus(needed + 0.01))
    with pytest.raises(
        ValueError, match=rf"^placement\.learner: .* needs {needed:.1f} GiB .*; with (.*) it needs (.*) GiB$"
    ) as refusal:
        plan.check(demo_on_gpus(needed - 0.05))
    assert "engine.gradient_checkpointing True" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    checkpointed = demo_on_gpus(needed - 0.05, engine={"gradient_checkpointing": True})
    plan.check(checkpointed)  # the advice holds


def test_steps_before_preference_updates_begin_are_planned_as_what_they_are():
    alone, joint, both = (
        forecast(demo_on_gpus(8.0, steps=100, preference=changed))
        for changed in ({"updates": 0}, {"start_step": 0}, {"start_step": 40})
    )
    assert both.before == pytest.approx(alone.seconds, rel=0.02)
    assert both.seconds == pytest.approx(joint.seconds, rel=0.02)
    assert both.before < 0.7 * both.seconds
    assert both.hours / both.gpus * 3600 == pytest.approx(40 * both.before + 60 * both.seconds)


def forecast(config):
    models = models_of(config)
    return forecast_of(config, step_of(config, models, GPUS["h100"]), GPUS["h100"])


def test_a_share_of_a_gpu_is_a_share_of_its_memory():
    config = demo_on_gpus(8.0)
    tree = config.model_dump(mode="json")
    tree["placement"]["learner"]["gpus"] = 0.25
    assert fit.room_of(config, "learner") == 8.0
    assert fit.room_of(parse_config(tree), "learner") == 2.0
    assert fit.room_of(parse_config(tree | {"runtime": "local"}), "learner") == 8.0
    assert fit.room_of(load_config(), "learner") is None


@pytest.mark.parametrize("name", ["demo", "demo_sd3", "demo_dmd2", "sdxl_lora_80gb"])
def test_shipped_configurations_are_planned_from_the_table(name, monkeypatch):
    """Every figure is known, nothing is measured, and what has GPUs says how long it takes. (tests/test_docs.py plans the others.)"""
    monkeypatch.setattr("flashdmd_ray.plan.measure.measure", None)
    config = load_config(name)
    run, parts, _ = plan.preview(config)
    text = plan.describe(config, run, parts, plan.gpu_of(config, None))
    assert "on loading" not in text
    assert "TFLOP per step" in text
    assert ("predicted: " in text) == any(placed.gpus for placed in config.placement.groups())
