"""A user's own reward by import path, and how entries of the configuration are checked."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor

from flashdmd_ray.config import RewardConfig, parse_config, validated
from flashdmd_ray.demo.scenes import render, sample_scenes
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.models.rewards import PixelReward, build_reward
from tests.models.rewards.small_rewards import bytes_as_images, noise_bytes
from tests.models.rewards.test_remote_rewards import PAGE, example
from tests.pages import blocks

CODE = """
import torch

class Module(torch.nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def score(self, images, texts):
        return self.scale * images.mean(dim=(1, 2, 3)) + torch.tensor([len(t) for t in texts])

class Whole:
    def score(self, images, texts):
        return images.mean()

class Numbers:
    def score(self, images, texts):
        return [1, 2, 3][: len(texts)]

class InPlace:
    def score(self, images, texts):
        answer = images.mean(dim=(1, 2, 3))
        images.zero_()
        texts.clear()
        return answer

class OneMemory:
    memory = torch.zeros(1)

    def score(self, images, texts):
        return self.memory.copy_(images.mean())

class Options:
    def __init__(self, weights):
        weights.clear()

    def score(self, images, texts):
        return [0.0] * len(texts)

class Async:
    async def score(self, images, texts):
        return [0.0] * len(texts)

class Tuple:
    def score(self, images, texts):
        return torch.zeros(len(texts)), {"more": 1}

class Nothing:
    def score(self, images, texts): ...

class Complex:
    def score(self, images, texts):
        return torch.zeros(len(texts), dtype=torch.complex64)

class Global:
    def __init__(self):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)

    def score(self, images, texts):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(True)
        return torch.zeros(len(texts), requires_grad=True)

class Exits:
    def score(self, images, texts):
        raise SystemExit(3)

class Silent: ...

class OneArgument:
    def score(self, images): ...

class Breaks(Whole):
    def __init__(self):
        raise RuntimeError("no such thing")

value = 3
"""


@pytest.fixture(autouse=True)
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(CODE)
    (tmp_path / "brightness.py").write_text(example("Your own reward"))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_rewards", "brightness", "ocr_reward"):
        sys.modules.pop(name, None)


IMAGES, TEXTS = bytes_as_images(noise_bytes(3, 5, 6)), ["", "a", "bc"]


def test_a_class_with_one_method():
    reward = build_reward("custom", "my_rewards:Module", options={"scale": 3.0}, batch=2)
    assert isinstance(reward, PixelReward)
    expected = 3 * IMAGES.mean(dim=(1, 2, 3)) + torch.arange(3)
    torch.testing.assert_close(reward.score(IMAGES, TEXTS), expected)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert reward.to("meta").own.scale.is_meta, "its parameters move along"
    assert build_reward("custom", "my_rewards:Numbers").score(IMAGES, TEXTS).tolist() == [1, 2, 3]


def test_the_example_of_the_page():
    reward = build_reward("custom", "brightness:Brightness", options={"darker": True})
    torch.testing.assert_close(reward.score(IMAGES, TEXTS), -IMAGES.mean(dim=(1, 2, 3)))
    assert len(example("Your own reward").splitlines()) <= 12


def test_the_reward_of_the_page_reads_text(tmp_path):
    """With a published OCR network: a sign, and the handwriting of the demo."""
    (tmp_path / "ocr_reward.py").write_text(example("A reward for legible text"))
    sign = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(sign).text((30, 110), "Hello 42", fill="black", font=ImageFont.load_default(40))
    image = pil_to_tensor(sign) / 127.5 - 1
    images = torch.stack([image, image, torch.ones_like(image)])
    reward = build_reward("custom", "ocr_reward:LegibleText")
    right, other, none = reward.score(images, ['the sign "Hello 42"', 'the sign "Halt"', "a wall"]).tolist()
    assert right == 1 > other > none == 0

    (block,) = (block for block in blocks(PAGE) if block.language == "bash" and "ocr_reward" in block.text)
    (settings,) = parse_config(yaml.safe_load(block.commands[-1][-1].replace("=", ": ", 1))).rewards
    digits = build_reward("custom", settings.path, options=settings.options)
    pixels, _ = render(scenes := sample_scenes(8, "held_out", seed=0))
    captions = [scene.caption for scene in scenes]
    own, others = (digits.score(pixels, texts).mean() for texts in (captions, captions[1:] + captions[:1]))
    assert own > others + 0.2


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("nowhere:Class", {}, "there is no module nowhere; install it, or add its folder to PYTHONPATH"),
        ("my_rewards.more:Class", {}, "there is no module my_rewards.more; install it"),
        ("my_rewards:Modul", {}, "the module my_rewards has no class Modul, did you mean 'Module'?"),
        ("my_rewards:value", {}, r"must be a class with a method score(images, texts)"),
        ("my_rewards:Silent", {}, r"must be a class with a method score(images, texts)"),
        ("my_rewards:OneArgument", {}, r"must take (images, texts), it is score(self, images)"),
        (
            "my_rewards:Module",
            {"sclae": 1},
            "my_rewards:Module cannot be built with options {'sclae': 1}: it is Module(scale=2.0)",
        ),
        ("divides:Class", {}, "cannot import the reward divides:Class: ZeroDivisionError"),
        ("leaves:Class", {}, "cannot import the reward leaves:Class: SystemExit"),
        ("needs:Class", {}, "No module named 'no_such_thing'; install that too"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_starts(path, options, says, tmp_path, monkeypatch):
    for name, text in (("divides", "1 / 0"), ("leaves", "exit(0)"), ("needs", "import no_such_thing")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    custom = {"kind": "custom", "path": path, "options": options}
    for read in (
        lambda: build_reward(**custom),
        lambda: reward_files(parse_config({"rewards": [custom], "run": {"name": "own"}})),
    ):
        with pytest.raises(ValueError, match=re.escape(says)) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_class_that_cannot_be_built_is_one_line():
    with pytest.raises(
        ValueError, match=r"my_rewards:Breaks cannot be built with options \{\}: RuntimeError: no such thing$"
    ):
        build_reward("custom", "my_rewards:Breaks")


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"my_rewards:Whole\.score returned shape \(\) for 3 images: it must be \(3,\)"
    ):
        build_reward("custom", "my_rewards:Whole").score(IMAGES, TEXTS)


@pytest.mark.parametrize("name", ["Async", "Tuple", "Nothing", "Complex"])
def test_an_answer_of_another_kind_is_explained(name):
    with pytest.raises(
        ValueError, match=rf"my_rewards:{name}\.score returned .*: it must return one number for each of the 3 images"
    ):
        build_reward("custom", f"my_rewards:{name}").score(IMAGES, TEXTS)


def test_what_a_class_does_to_what_it_is_lent_or_lends_stays_with_it():
    images, texts = IMAGES.clone(), list(TEXTS)
    mean = IMAGES.mean(dim=(1, 2, 3))
    torch.testing.assert_close(build_reward("custom", "my_rewards:InPlace").score(images, texts), mean)
    assert torch.equal(images, IMAGES)
    assert texts == TEXTS
    torch.testing.assert_close(build_reward("custom", "my_rewards:OneMemory", batch=1).score(IMAGES, TEXTS), mean)
    options = {"weights": [1, 2]}
    build_reward("custom", "my_rewards:Options", options=options)
    assert options == {"weights": [1, 2]}
    before = torch.get_default_dtype(), torch.get_num_threads()
    with torch.no_grad():
        scores = build_reward("custom", "my_rewards:Global").score(IMAGES, TEXTS)
        assert not torch.is_grad_enabled()
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before
    assert (scores.dtype, scores.requires_grad) == (torch.float32, False)
    with pytest.raises(RuntimeError, match=r"my_rewards:Exits\.score called sys\.exit"):
        build_reward("custom", "my_rewards:Exits").score(IMAGES, TEXTS)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"kind": "pikscore"}, "unknown reward 'pikscore', did you mean 'pickscore'"),
        ({"kind": "hpsv3"}, "'hpsv3' is not built in.* use kind remote"),
        ({"kind": "hpsv2.1"}, "no demo weights of kind 'hpsv2.1'; name them, such as xswu/HPSv2"),
        (
            {"kind": "hpsv2", "path": "xswu/HPSv2/HPS_v2.1_compressed.pt"},
            "holds a reward of kind 'hpsv2.1', not 'hpsv2'",
        ),
        ({"kind": "hpsv2", "path": "x", "base": "y"}, "base: a reward of kind 'hpsv2' reads none"),
        ({"kind": "remote", "path": "example.org/score"}, "needs the server's http:// or https:// address"),
        ({"kind": "remote", "path": "file:///etc/passwd"}, "needs the server's http:// or https:// address"),
        ({"kind": "remote", "path": "http://a:b@host/"}, "no user or password in an address"),
        ({"kind": "remote", "path": "http://host/", "remote": {"timeout": 3}}, "did you mean 'timeout_s'"),
        ({"kind": "remote", "path": "http://host/", "remote": {"timeout_s": 0}}, "greater than 0"),
        ({"kind": "custom", "path": "a.b.C"}, "kind custom needs package.module:Class, got 'a.b.C'"),
        ({"kind": "pickscore", "options": {"a": 1}}, "options: go with kind custom"),
        ({"kind": "pickscore", "remote": {}}, "remote: goes with kind remote"),
        ({"kind": "pickscore", "batch": 0}, "greater than or equal to 1"),
        ({"kind": "pickscore", "dtype": "half"}, "'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_entries_of_the_configuration(tree, says):
    with pytest.raises(ValueError, match=says) as caught:
        validated(RewardConfig, tree)
    assert "\n" not in str(caught.value)


def test_where_the_rest_of_a_model_comes_from(tmp_path):
    def base(kind: str, path: str, **more: str) -> str:
        return validated(RewardConfig, {"kind": kind, "path": path, **more}).base_path

    clip_h, clip_l = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
    assert base("pickscore", "yuvalkirstain/PickScore_v1") == clip_h
    assert base("pickscore", "someone/other") == "someone/other"
    assert base("pickscore", str(tmp_path)) == str(tmp_path)
    assert base("pickscore", str(tmp_path), base="elsewhere") == "elsewhere"
    assert base("clipscore", clip_l) == clip_l
    assert base("aesthetic", "file.pth") == clip_l
    assert base("mps", str(tmp_path)) == clip_h
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert base("mps", str(tmp_path)) == str(tmp_path)
    assert base("hpsv2", "xswu/HPSv2") == base("custom", "a:B") == ""
