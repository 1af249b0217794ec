"""The plan: parameters from file headers, memory and schedule as arithmetic, damaged files refused before anything is loaded."""

import importlib
import importlib.util
import json
import re
import socket

import pytest
import torch
from PIL import Image

from flashdmd_ray import plan
from flashdmd_ray.config import parse_config
from flashdmd_ray.plan.check import missing_packages
from tests.model_folders import PARTS, model_settings
from tests.tiny import save_sam


@pytest.fixture
def settings(tmp_path):
    return model_settings(tmp_path)


def plan_text(settings, **changes):
    config = parse_config(settings | changes)
    return plan.describe(config, *plan.check(config))


def row(text, name):
    """The first line that starts so: of the roles, of the learner where others have it too."""
    return next(line.split() for line in text.splitlines() if line.strip().startswith(name))


def test_parameters_are_counted_without_loading(settings):
    text = plan_text(settings, steps=200)
    assert row(text, "teacher ")[2] == f"{PARTS['unet']:,}"
    assert row(text, "discriminator: SAM")[3] == "500"
    assert row(text, "reward: latent")[3] == "70"
    assert "200 steps, batch 32" in text
    assert "1,000 preference updates" in text


def test_schedule_counts_updates(settings):
    text = plan_text(settings, steps=100, ttur=2, preference={"updates": 3, "every": 4, "start_step": 10})
    assert (
        "in all: 100 generator, 200 score-estimator, 200 discriminator, 69 preference updates; 3,200 distillation samples"
        in text
    )


def test_schedule_says_which_rates_fall(settings):
    falling = {"generator": {"lr": 3e-5, "decay": 100, "floor": 0.1}, "score": {"lr": 6e-4, "decay": 1500}}
    text = plan_text(settings, steps=1000, ttur=2, **falling)
    assert "generator rate: from 3e-05 down to 3e-06 at update 100 of 1,000" in text
    assert "score-estimator rate: from 0.0006 down to 0 at update 1,500 of 2,000" in text
    assert "discriminator rate" not in text
    assert "score-estimator rate" not in plan_text(settings, score={"decay": 50}, preference={"distill": False})


def test_an_object_store_must_hold_two_published_versions(settings, monkeypatch):
    two_float32 = 2 * 4 * PARTS["unet"] / 0.8  # Ray moves objects to a disk above .8
    module = importlib.import_module("flashdmd_ray.plan.check")
    monkeypatch.setattr(module, "store_bytes", lambda: two_float32)
    plan_text(settings)
    monkeypatch.setattr(module, "store_bytes", lambda: two_float32 - 1)
    with pytest.raises(
        ValueError, match=r"/dev/shm: publishing weights .* or set placement\.rollout\.within to learner"
    ):
        plan_text(settings)
    plan_text(settings, placement={"rollout": {"within": "learner"}, "learner": {"workers": 1}})


def test_without_preference_updates_there_are_no_pools(settings):
    text = plan_text(settings, preference={"updates": 0})
    assert "rollout" not in text
    assert "reward" not in text
    assert "reference policy" not in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "teacher/unet/diffusion_pytorch_model.safetensors").unlink(),
            r"model\.teacher: .*unet has no \.safetensors",
        ),
        (
            lambda root: truncate(root / "teacher/vae/diffusion_pytorch_model.safetensors"),
            r"model\.teacher: .*vae.* is damaged",
        ),
        (
            lambda root: (root / "sam/model.safetensors").write_bytes(b"not a model"),
            r"model\.sam: .*model\.safetensors is damaged",
        ),
        (
            lambda root: (root / "clip/model.safetensors").write_bytes(b""),
            r"rewards\.0\.path: .*model\.safetensors is damaged",
        ),
        (lambda root: (root / "lrm/config.json").write_text("{"), r"rewards\.1\.path: .*config\.json is damaged"),
        (
            lambda root: (root / "teacher/unet/config.json").write_text("{}"),
            r"model\.teacher: .*config\.json lacks 'sample_size'",
        ),
        (
            lambda root: (root / "teacher/model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            r"model\.teacher: .* holds a FluxPipeline",
        ),
        (lambda root: (root / "teacher/model_index.json").unlink(), r"model\.teacher: .*model_index\.json is missing"),
    ],
)
def test_missing_and_damaged_files_are_named(settings, tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        plan.check(parse_config(settings))
    assert "\n" not in str(refusal.value)


def test_an_official_sam_checkpoint_is_one_file(settings, tmp_path):
    settings["model"]["sam"] = str(tmp_path / "sam_vit_b.pth")
    with pytest.raises(ValueError, match=r"model\.sam: .* does not exist"):
        plan.check(parse_config(settings))
    size = save_sam(tmp_path / "sam_vit_b.pth").stat().st_size
    assert row(plan_text(settings), "discriminator: SAM")[3] == f"{size // 4:,}"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 2, 2, 8)}, tmp_path / "sam_vit_b.pth")
    with pytest.raises(ValueError, match=r"sam_vit_b\.pth is not a Segment Anything checkpoint"):
        plan.check(parse_config(settings))


@pytest.mark.parametrize("path", ["/no/where", "./no", "no\nwhere", "nobody/nothing"])
def test_a_path_that_is_no_model_is_refused(settings, path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings["model"]["teacher"] = path
    with pytest.raises(ValueError, match=r"model\.teacher: .*; correct the path"):
        plan.check(parse_config(settings))


ABSENT = {
    "source": ({"data": {"source": "/no/where.tar"}}, "data.source: /no/where.tar does not exist"),
    "prompts": (
        {"data": {"source": "images", "prompts": "/no/where.txt"}},
        "data.prompts: no such file: /no/where.txt",
    ),
    "empty prompts": (
        {"data": {"source": "images", "prompts": "empty.txt"}},
        "data.prompts: empty.txt holds no usable sample (blank line: 2",
    ),
    "another column": (
        {"data": {"source": "images", "prompts": "rows.jsonl"}},
        "rows.jsonl: no column any of caption, text",
    ),
    "embeddings": (
        {"data": {"source": "images", "embeddings": "/no/where"}},
        "data.embeddings: /no/where has no manifest.json",
    ),
    "of another model": (
        {"data": {"source": "images", "embeddings": "stored"}},
        "data.embeddings: stored was computed for something else",
    ),
    "of another size": (
        {"data": {"source": "images", "latents": "stored"}, "adversarial": {"real_through_vae": True}},
        "data.latents: stored was computed for something else (kind is embeddings and the run's latents",
    ),
    "grid's prompts": ({"evaluation": {"prompts": "/no/where.txt"}}, "evaluation.prompts: no such file"),
    "no grid's prompts": ({"evaluation": {"prompts": "empty.txt"}}, "evaluation.prompts: empty.txt holds no prompt"),
    "no captions": (
        {"data": {"source": "bare", "prompts": "good.txt"}, "adversarial": {"prompt_projection": True}},
        "data.source: a.png has no caption; add captions (docs/data.md), or switch adversarial.prompt_projection off",
    ),
    "bad ones": (
        {"evaluation": {"prompts": "bad.jsonl"}},
        "evaluation.prompts bad.jsonl: 1 of 3 samples are bad (33.3%",
    ),
}


@pytest.mark.parametrize("what", ABSENT)
def test_the_dry_run_and_the_start_refuse_the_same_data(what, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "bare" / "a.png")
    (tmp_path / "good.txt").write_text("a cat\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "rows.jsonl").write_text('{"title": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    key = {"kind": "embeddings", "family": "sdxl", "model": "another"}
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "manifest.json").write_text(json.dumps({"format": 1, "key": key, "shards": []}))
    changes, said = ABSENT[what]
    config = parse_config(settings | changes)
    (line,) = plan.preview(config)[2]
    assert said in line
    with pytest.raises(ValueError, match="^" + re.escape(line) + "$"):
        plan.check(config)


def test_packages_that_are_not_installed_are_missed(settings, monkeypatch):
    rewards = [{"kind": "hpsv2.1", "path": "xswu/HPSv2"}]
    tree = settings | {"engine": {"optimizer": "adamw_8bit"}, "rewards": rewards, "data": {"source": "hf:a/b"}}
    find = importlib.util.find_spec
    gone = {"bitsandbytes", "open_clip", "datasets"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    lines = missing_packages(parse_config(tree))
    assert [line.partition(":")[0] for line in lines] == ["engine.optimizer", "rewards.0.kind", "data.source"]
    gone.clear()
    assert len(missing_packages(parse_config(tree | {"engine": {}}))) == 0


def test_parts_of_the_demo_are_refused_beside_another_teacher(settings):
    model = {"model": {"teacher": settings["model"]["teacher"]}, "run": {"dir": settings["run"]["dir"]}}
    config = parse_config(model | {"rewards": [{"kind": "pickscore"}]})
    for read in (plan.preview, plan.check):
        with pytest.raises(ValueError, match=r"name captioned images") as refusal:
            read(config)
        keys = [line.partition(":")[0] for line in str(refusal.value).splitlines()]
        assert keys == ["data.source", "model.sam", "rewards.0.path", "run.name"]


def test_checking_creates_nothing_and_frees_the_address_it_tried(settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = parse_config(settings | {"runtime": "ray", "control": {"port": port}})
        with pytest.raises(
            ValueError, match=rf"control: cannot listen on 127\.0\.0\.1:{port} .*set control\.port to 0"
        ):
            plan.check(config)
    for _ in range(2):
        plan.check(config)
    assert sorted(tmp_path.rglob("*")) == before


def truncate(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert len(header) == 2, "a real file with two tensors"
    path.write_bytes(data[:-4])
