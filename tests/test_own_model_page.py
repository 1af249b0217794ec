"""The tutorial docs/own_model.md: its commands, as the page has them, from a checkpoint and photographs to exports."""

import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tiny import save_sam, save_sdxl

from flashdmd_ray.__main__ import main
from flashdmd_ray.config import load_config
from tests.models.rewards.small_rewards import write_clip
from tests.pages import ROOT, blocks, flashdmd

PAGE = ROOT / "docs" / "own_model.md"
COMMANDS = [command for block in blocks(PAGE) for command in block.commands]
SMALL = [
    "steps=2",
    "preference={start_step: 0, updates: 1, threshold: 0.0}",
    "rewards=[{kind: pickscore, path: models/pickscore, skip_noise_check: random weights}]",  # in place of the hub's
    "placement.threads=1",
    "evaluation.samples=4",
    "evaluation.teacher_steps=2",
    "tracking.enabled=false",
]


def page_commands(name):
    """Arguments of the page's calls of one command."""
    return [words for command in COMMANDS if (words := flashdmd(command)) and words[0] == name]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: a small random teacher, SAM and reward, photographs with captions, and prompts."""
    home = tmp_path_factory.mktemp("home")
    save_sdxl(home / "models" / "my_sdxl")
    save_sam(home / "models" / "sam_vit_b_01ec64.pth")
    write_clip(home / "models" / "pickscore")
    (home / "photos").mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 50).convert("RGB").save(home / "photos" / f"{number}.jpg")
        (home / "photos" / f"{number}.txt").write_text(f"photograph {number}")
    (home / "prompts.txt").write_text("a cat\na dog\na lighthouse at dusk\n")
    return home


@pytest.fixture(scope="module")
def run(home):
    """The page's steps 1 to 4; returns the folder of the finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (new,) = page_commands("config")
        assert main([*new, "--gpus", "0"]) == 0
        checks = page_commands("data")
        assert [main(check) for check in checks] == [0, 0]
        dry, *trainings = page_commands("train")
        assert "--dry-run" in dry
        assert main(dry) == 0
        assert len(trainings) == 2
        for training in trainings:
            settings = [] if "--set" in training else ["--set"]
            given = [word for word in training if word.startswith(("steps=", "evaluation."))]
            assert main([*training, *settings, *SMALL, *given]) == 0
    assert load_config(home / "my_sdxl.yaml").model.teacher == "models/my_sdxl"
    return home / "runs" / "my_sdxl"


def test_the_pages_exports_are_written(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    assert (run.parent / "trial" / "export").is_dir()
    exports = page_commands("export")
    assert [main(export) for export in exports] == [0, 0]
    assert (run / "kohya" / "flashdmd_lora.safetensors").is_file()
    pipeline = StableDiffusionXLPipeline.from_pretrained("models/my_sdxl", use_safetensors=True)
    pipeline.load_lora_weights("runs/my_sdxl/lora")
