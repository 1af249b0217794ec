"""Settings in sight: the page, the schemas and `flashdmd config` say what the configuration's types say."""

import jsonschema
import pytest
import yaml

from flashdmd_ray.__main__ import main
from flashdmd_ray.config import PRESETS, Config
from flashdmd_ray.reference.pages import SCHEMAS, files, schema
from flashdmd_ray.reference.settings import JOBS, settings_of
from flashdmd_ray.reward_training.config import RewardTrainingConfig


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_the_written_reference_is_fresh(path):
    assert path.read_text(encoding="utf-8") == files()[path], "run `make reference`"


@pytest.mark.parametrize("job", JOBS)
def test_every_setting_has_a_meaning(job):
    assert [one.key for one in settings_of(JOBS[job]) if not one.meaning] == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_the_schema_that_accepts_it_and_refuses_a_wrong_key(name):
    section = RewardTrainingConfig if name.startswith("latent_reward") else Config
    text = PRESETS[name].read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMAS[section].name}\n")
    validator = jsonschema.Draft202012Validator(schema(section))
    tree = yaml.safe_load(text)
    assert list(validator.iter_errors(tree)) == []
    assert len(list(validator.iter_errors(tree | {"model": {"famly": "sdxl"}}))) == 1


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("preference.beta", "preference.beta: number above 0; default"),
        ("rewards.1.weight", "rewards.N.weight: number"),
        ("placement.pools.fast.workers", "placement.pools.NAME.workers: integer at least 1"),
        ("limits.images", "# of flashdmd serve\nlimits.images: "),
        ("lora", "lora.rank"),
    ],
)
def test_a_key_is_explained(key, said, capsys):
    assert main(["config", key]) == 0
    assert said in capsys.readouterr().out


def test_an_unknown_key_is_refused_with_the_nearest(capsys):
    assert main(["config", "beta"]) == 2
    assert capsys.readouterr().err == "error: beta: unknown key, did you mean preference.beta?\n"
