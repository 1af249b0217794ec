"""The configuration: shipped files parse, mistakes are named with a remedy."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.config import (
    PRESETS,
    Config,
    Section,
    dump_changes,
    dump_config,
    load_config,
    parse_config,
    validated,
)
from flashdmd_ray.reward_training.config import RewardTrainingConfig


def test_a_configuration_is_a_file_or_the_name_of_a_preset(tmp_path, monkeypatch):
    assert load_config() == load_config("demo") == load_config(PRESETS["demo"])
    with pytest.raises(
        ValueError, match=r"no file and no preset, did you mean 'sdxl_lora_24gb'\?; the presets are demo,"
    ):
        load_config("sdxl_lora24gb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl_lora_24gb").write_text("steps: 3")
    assert load_config("sdxl_lora_24gb").steps == 3, "a file of that name goes first"


def test_overrides_win_and_types_are_coerced():
    config = load_config(None, ["steps=7", "generator.lr=1e-5", "sampling.timesteps=[999, 499]", "run.name=x"])
    assert (config.steps, config.generator.lr, config.sampling.timesteps, config.run.name) == (7, 1e-5, (999, 499), "x")
    assert config.student_timesteps == {1: (999,), 2: (999, 499)}
    assert config.high_noise_steps == 1


def test_the_dump_is_the_same_configuration():
    config = load_config(None, ["rewards=[{kind: latent, weight: 2}]"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert parse_config(yaml.safe_load(dump_changes(config))) == config


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("latent_reward")])
def test_the_settings_that_are_printed_are_the_configuration_and_no_more(name):
    config, said = load_config(name), dump_changes(load_config(name))
    assert parse_config(yaml.safe_load(said)) == config
    assert "null" not in said, "no preset sets anything to null that is not so by default"
    assert said.count("\n") <= 45


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("stpes=3", "stpes", "did you mean 'steps'"),
        ("score.emma=0.9", "score.emma", "did you mean 'ema'"),
        ("rewards=[{kind: latent, wieght: 1}]", "rewards.0.wieght", "did you mean 'weight'"),
        ("ttur=0", "ttur", "greater than or equal to 1"),
        ("preference.candidates=1", "preference.candidates", "greater than or equal to 2"),
        ("preference.beta=0", "preference.beta", "greater than 0"),
        ("preference.beta=.nan", "preference.beta", "finite"),
        ("sampling.timesteps=[249, 999]", "sampling.timesteps", "strictly descending"),
        ("sampling.timesteps=[999, 999]", "sampling.timesteps", "strictly descending"),
        ("sampling.timesteps=[1000]", "sampling.timesteps", "less than or equal to 999"),
        ("sampling.timesteps=[999]", "preference.updates", "set it to 0"),
        ("rewards=[{kind: pikscore}]", "rewards.0.kind", "did you mean 'pickscore'"),
        ("rewards=[{kind: latent, weight: 0}]", "rewards.0.weight", "greater than 0"),
        ("rewards=[{kind: latent, held_out: true}]", "rewards", "at least one reward that is not held out"),
        ("rewards=[{kind: latent, pool: rollout}]", "rewards", "give it another name"),
        ("placement.pools.rewrad.workers=2", "placement.pools.rewrad", "did you mean 'reward'"),
        ("placement.pools.reward.wrkers=2", "placement.pools.reward.wrkers", "did you mean 'workers'"),
        ("placement.rollout={workers: 3, max_workers: 2}", "placement.rollout", "below workers 3"),
        ("placement.learner.max_workers=2", "placement.learner.max_workers", "did you mean 'workers'"),
        ("rewards=[{kind: hpsv2}]", "rewards.0", "no demo weights of kind 'hpsv2'; name them, such as xswu/HPSv2"),
        (
            "rewards=[{kind: remote, path: x, remote: {timeout: 3}}]",
            "rewards.0.remote.timeout",
            "did you mean 'timeout_s'",
        ),
        ("rewards=[{kind: latent}, {kind: latent}]", "rewards", "give each a name"),
        ("rewards=[]", "rewards", "preference.updates to 0"),
        ("placement.learner.workers=3", "placement.learner.workers", "multiple"),
        ("run.name=../up", "run.name", "plain folder name"),
        ("batch=many", "batch", "integer"),
        ("steps=true", "steps", "integer"),
        ("runtime=rey", "runtime", "'local' or 'ray'"),
        ("matching.timestep_range=[500, 20]", "matching.timestep_range", "below the second"),
        ("evaluation.student_steps=[3]", "evaluation.student_steps", "choose divisors"),
        ("adversarial.space=latent", "score.ema", "set score.ema to 1"),
        ("lora.networks=[generator]", "score.ema", "set score.ema to 1, or lora.networks to [generator, score]"),
        ("lora.networks=[score]", "score.ema", "an adapter and the other a whole network"),
        ("lora.networks=[score, score]", "lora.networks", "names a network twice"),
        ("lora.networks=[discriminator]", "lora.networks.0", "'generator' or 'score'"),
        ("lora.targets=[]", "lora.targets", "null adapts the attention projections"),
        ("lora.alpha=0", "lora.alpha", "greater than 0"),
        ("evaluation.ema=1", "evaluation.ema", "less than 1"),
        ("generator.decay=20", "generator", "still rises for 20; set decay above warmup"),
        ("preference={warmup: 9, decay: 5}", "preference", "still rises for 9; set decay above warmup"),
        ("score.floor=0.5", "score", "set decay, or floor to 0"),
        ("score.floor=1.5", "score.floor", "less than or equal to 1"),
        ("seed.x=1", "seed", "integer"),
        ("steps", "steps", "key=value"),
        ("preference={updates: 0, distill: false}", "preference.distill", "nothing to train"),
    ],
)
def test_mistakes_are_one_line_with_key_and_remedy(override, key, remedy):
    with pytest.raises(ValueError, match=key.split(".")[-1]) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert key in message
    assert remedy in message
    assert "\n" not in message


def test_pools_by_name_start_from_the_common_setting():
    rewards = "rewards=[{kind: pickscore}, {kind: latent, pool: other}]"
    config = load_config(None, [rewards, "placement.reward={workers: 2, cpus: 3}", "placement.pools.other.workers=5"])
    assert {name: [r.label for r in rewards] for name, rewards in config.reward_pools.items()} == {
        "pickscore": ["pickscore"],
        "other": ["latent"],
    }
    assert (config.placement.of("other").workers, config.placement.of("other").cpus) == (5, 3)
    assert (config.placement.of("pickscore").workers, config.placement.key("pickscore")) == (2, "placement.reward")
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    seen = config.for_pool("other")
    assert [reward.label for reward in seen.rewards] == ["latent"]
    assert seen.placement.of("other").workers == 5


def test_one_process_has_no_growing_pools():
    with pytest.raises(ValueError, match="needs runtime 'ray'"):
        load_config(None, ["runtime=local", "placement.pools.reward.max_workers=2"])


def test_adapters_compute_in_the_type_of_their_base():
    half = ["lora.networks=[generator, score]", "engine.precision=bfloat16"]
    with pytest.raises(ValueError, match=r"model.dtype: with lora.networks .* set both alike"):
        load_config(None, half)
    assert load_config(None, [*half, "model.dtype=bfloat16"]).lora.networks == ("generator", "score")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values"):
        load_config(tmp_path / "list.yaml")


def settings_of(section: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every setting of a section and of those inside it, with its value."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from settings_of(value, (*path, name))
        elif path:
            yield (*path, name), value


@pytest.mark.parametrize("whole", [Config, RewardTrainingConfig])
def test_a_setting_given_its_default_leaves_the_rest_of_its_section_alone(whole):
    default = whole()
    for path, value in settings_of(default):
        tree: object = value
        for name in reversed(path):
            tree = {name: tree}
        assert validated(whole, tree) == default, ".".join(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
    )
)
def test_any_value_is_accepted_or_refused_with_a_valueerror(value):
    for section in ("steps", "sampling", "rewards"):
        try:
            parse_config({section: value})
        except ValueError as error:
            message = str(error)
        else:
            message = section
        assert section in message


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, flashdmd_ray.config as c; c.load_config(); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_field_has_a_docstring_or_speaks_for_itself():
    plain = {"betas", "weight_decay", "seed", "warmup", "experiment", "batch"}
    for name, section in Config.model_fields.items():
        fields = getattr(section.annotation, "model_fields", None) or {}
        for field, info in fields.items():
            assert info.description or field in plain, f"{name}.{field} has no docstring"
