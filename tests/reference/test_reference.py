"""Settings in sight: the page, the schemas and `flashdmd config` say what the configuration's types say."""

import re

import jsonschema
import pytest
import yaml
from diffusers import StableDiffusionXLPipeline

from flashdmd_ray.__main__ import main
from flashdmd_ray.config import PRESETS, Config, load_config
from flashdmd_ray.plan.costs import table
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.specs import all_of, key_of
from flashdmd_ray.reference.pages import SCHEMAS, files, schema
from flashdmd_ray.reference.settings import JOBS, settings_of
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from tests.pages import ROOT
from tests.tiny import save_sdxl, write_single_file


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


def test_a_new_configuration_without_images_reads_those_that_the_teacher_draws(tmp_path, capsys):
    out, prompts = tmp_path / "new.yaml", tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    assert main(["config", "new", "sd15", "--prompts", str(prompts), "--gpus", "1", "--out", str(out)]) == 0
    drawn = re.search(r"flashdmd data .* --teacher-images 2000 --config \S+ --out (\S+),", capsys.readouterr().out)[1]
    config = load_config(out)
    assert (config.data.source, config.data.prompts) == (f"{drawn}/images", str(prompts))
    assert config.adversarial.space == "latent", "Segment Anything is not here"
    assert main(["config", "new", "sd15", "--gpus", "1"]) == 2, "neither images nor prompts"


def test_a_teacher_of_one_file_needs_a_pipeline_of_the_same_model_where_no_hub_is(tmp_path, capsys):
    whole, out = save_sdxl(tmp_path / "whole"), tmp_path / "new.yaml"
    pipeline = StableDiffusionXLPipeline.from_pretrained(whole, use_safetensors=True)
    file = write_single_file(pipeline, "sdxl", tmp_path / "model.safetensors")
    (tmp_path / "photos").mkdir()
    command = ["config", "new", "sdxl", "--images", str(tmp_path / "photos"), "--teacher", str(file), "--gpus", "0"]
    command += ["--out", str(out)]
    assert main(command) == 2
    assert "error: --teacher-config: " in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--teacher-config", str(whole)]) == 0
    assert load_config(out).model.teacher_config == str(whole)


@pytest.mark.parametrize(
    ("family", "gpus", "memory", "side", "ranks"),
    [("sdxl", 1, 24, None, 1), ("sd3", 1, 80, None, 1), ("sd15", 2, 24, None, 2)],
)
def test_a_new_configuration_fits_the_gpus_it_is_written_for(family, gpus, memory, side, ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("flashdmd_ray.plan.measure.measure", None)  # its networks are in the table of costs
    (tmp_path / "photos").mkdir()
    out = tmp_path / "new.yaml"
    command = ["config", "new", family, "--images", str(tmp_path / "photos"), "--out", str(out)]
    command += ["--sam", "sam_vit_b_01ec64.pth"]
    assert main([*command, "--gpus", str(gpus), "--gpu-memory", str(memory)]) == 0
    config = load_config(out)
    assert config.model.resolution == side
    assert config.placement.learner.workers == ranks
    assert config.adversarial.space == "pixel"
    assert config.placement.learner.gpu_memory_gib == memory - 0.5


def test_every_preset_and_all_that_is_written_anew_is_planned_from_the_table_of_costs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from plan_costs import shipped

    configurations = dict(shipped())
    assert not any("sd15" in name and "768" in name for name in configurations), "above the teacher's own 512 pixels"
    missing = [
        f"{name}: {spec['kind']}"
        for name, config in configurations.items()
        for spec in all_of(config, models_of(config))
        if key_of(spec) not in table()
    ]
    assert missing == [], "run `python benchmarks/plan_costs.py`"
