"""`flashdmd sample` and `flashdmd score`: images of prompts in a folder, and what judges say of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from lpips import LPIPS
from PIL import Image, ImageOps
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from flashdmd_ray.__main__ import main
from flashdmd_ray.config import RewardConfig
from flashdmd_ray.data.executor import in_threads
from flashdmd_ray.models.sd3 import SD3
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.results.drawing import Drawing, Order, draw
from flashdmd_ray.results.evaluation import fid, frechet_distance
from flashdmd_ray.results.export import export_pipeline
from flashdmd_ray.results.folder_scores import bootstrap_mean, cmmd, diversity, kid, paired
from flashdmd_ray.results.judging import Images, InceptionJudge, LpipsJudge, RewardJudge, judged
from flashdmd_ray.roles.image_sampling import seed_of
from flashdmd_ray.runtime.data_stream import on_ray
from tests.results.test_export import FACTS, trained
from tests.tiny import save_sd3, save_sdxl

PROMPTS = ("a red 4", "two 7s", "a blue 3")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = SDXL.from_pretrained(str(save_sdxl(tmp_path_factory.mktemp("base"))))
    out = tmp_path_factory.mktemp("student") / "export"
    return export_pipeline(family, trained(family), (999, 749, 499, 249), out, FACTS)


ORDER = Order(PROMPTS, per_prompt=2)


def drawn(model: Path, out: Path, order: Order = ORDER, **drawing: int) -> dict[str, bytes]:
    draw(Drawing(str(model), **drawing), order, out, in_threads, "cpu")
    return {file.name: file.read_bytes() for file in sorted(out.rglob("*.png"))}


@pytest.fixture(scope="module")
def folder(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "images"
    drawn(export, out)
    return out


def stops_after_one(make_worker, items, workers) -> Iterator[object]:
    do = make_worker()
    yield do(items[0])
    raise KeyboardInterrupt


def test_images_are_those_of_plain_diffusers(export: Path, folder: Path) -> None:
    facts = json.loads((export / "flashdmd.json").read_text())
    pipeline = StableDiffusionXLPipeline.from_pretrained(export, use_safetensors=True)
    generator = torch.Generator().manual_seed(seed_of(0, 3))
    image = pipeline("two 7s", generator=generator, **facts["call"]).images[0]
    image.save(folder.parent / "plain.png")
    assert (folder / "000003.png").read_bytes() == (folder.parent / "plain.png").read_bytes()
    assert Images.read(folder).prompts == tuple(prompt for prompt in PROMPTS for _ in range(2))


def test_an_interrupted_drawing_goes_on_where_it_was(export: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        draw(Drawing(str(export)), ORDER, out, stops_after_one, "cpu")
    assert len(list(out.glob("*.png"))) == 4
    assert draw(Drawing(str(export)), ORDER, out, in_threads, "cpu") == 2
    for file in folder.glob("0*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="drawn in another way"):
        drawn(export, out, steps=2)
    with pytest.raises(ValueError, match=r"000000\.png was drawn of another prompt"):
        drawn(export, out, Order(("a green 9",), 2))


@pytest.mark.usefixtures("ray_cluster")
def test_ray_draws_and_judges_the_same(export: Path, folder: Path, tmp_path: Path) -> None:
    assert draw(Drawing(str(export)), ORDER, tmp_path / "drawn", on_ray, "cpu", batch=3) == 6
    for file in folder.glob("0*"):
        assert (tmp_path / "drawn" / file.name).read_bytes() == file.read_bytes()
    judge, images = RewardJudge(RewardConfig(kind="pickscore"), "cpu"), Images.read(folder)
    there, here = (
        judged(judge, images, tmp_path / name, executor) for name, executor in (("there", on_ray), ("here", in_threads))
    )
    assert torch.allclose(there["score"], here["score"], atol=1e-4)


def test_fewer_steps_of_a_student_take_every_kth_timestep(export: Path, folder: Path, tmp_path: Path) -> None:
    order = Order(PROMPTS[:1])
    four, two = (drawn(export, tmp_path / str(n), order=order, steps=n) for n in (4, 2))
    assert four["000000.png"] == (folder / "000000.png").read_bytes() != two["000000.png"]
    with pytest.raises(ValueError, match=r"4 timesteps, so one of \[1, 2, 4\]"):
        drawn(export, tmp_path / "3", order=order, steps=3)


def test_a_flow_student_draws_the_same_in_any_batch(tmp_path: Path) -> None:
    """The stock scheduler takes noise from torch's own generator, whatever generator the pipeline is given."""
    family = SD3.from_pretrained(str(save_sd3(tmp_path / "base")))
    export = export_pipeline(family, trained(family), (999, 499), tmp_path / "export", FACTS)
    together = drawn(export, tmp_path / "together", order=Order(PROMPTS))
    alone = drawn(export, tmp_path / "alone", order=Order(PROMPTS[:2]))
    assert together["000001.png"] == alone["000001.png"] != alone["000000.png"]


def test_genevals_layout(export: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"tag": "colors", "prompt": prompt}) for prompt in PROMPTS]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(lines) + "\n")
    arguments = ["sample", str(export), "--prompts", str(file), "--out", str(tmp_path / "out"), "--per-prompt", "2"]
    assert main([*arguments, "--layout", "geneval", "--limit", "2"]) == 0
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    samples = [f"0000{n}/{name}" for n in (0, 1) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")]
    assert found == [*samples, "drawing.json"]
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text())["prompt"] == PROMPTS[1]


def test_dpg_benchs_grids(export: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, prompt in zip(("COCOval_7", "partiprompts12"), PROMPTS, strict=False):
        (folder / f"{name}.txt").write_text(prompt)
    arguments = ["sample", str(export), "--prompts", str(folder), "--out", str(tmp_path / "out"), "--layout", "dpg"]
    assert main([*arguments, "--per-prompt", "4", "--batch", "3"]) == 0
    out = tmp_path / "out"
    assert sorted(file.name for file in (out / "grids").iterdir()) == ["COCOval_7.png", "partiprompts12.png"]
    grid, last = Image.open(out / "grids" / "partiprompts12.png"), Image.open(out / "000007.png")
    assert grid.size == (2 * last.width, 2 * last.height)
    quarter = grid.crop((last.width, last.height, 2 * last.width, 2 * last.height))
    assert quarter.tobytes() == last.tobytes()
    assert (out / "000007.txt").read_text() == PROMPTS[1] + "\n"
    (out / "grids" / "COCOval_7.png").unlink()
    capsys.readouterr()
    assert main([*arguments, "--per-prompt", "4"]) == 0
    assert "1 images drawn, 7 were there" in capsys.readouterr().out
    assert (out / "grids" / "COCOval_7.png").is_file()
    assert main([*arguments, "--per-prompt", "3"]) == 2
    assert main([*arguments[:3], str(out / "grids"), *arguments[4:]]) == 2
    said = capsys.readouterr().err
    assert "DPG-Bench reads 4 images of a prompt, or 1" in said
    assert "--prompts must be DPG-Bench's folder of prompts" in said


def test_judging_goes_on_where_it_was_and_notices_another_image(folder: Path, tmp_path: Path) -> None:
    judge, images = RewardJudge(RewardConfig(kind="pickscore"), "cpu"), Images.read(folder)
    with pytest.raises(KeyboardInterrupt):
        judged(judge, images, tmp_path, stops_after_one, 4)
    asked: list[object] = []

    def counts(make_worker, items, workers) -> Iterator[object]:
        asked.extend(items)
        return in_threads(make_worker, items, workers)

    columns = judged(judge, images, tmp_path, counts, 4)
    assert len(asked) == 1
    assert columns["score"].shape == (6,)
    assert torch.allclose(columns["features"].norm(dim=1), torch.ones(6))
    broken = tmp_path / "images"
    broken.mkdir()
    (broken / "a.png").write_bytes((folder / "000000.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        judged(judge, Images.read(broken), tmp_path, in_threads)


class RandomInception(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args: object, **settings: object) -> None:
        """Keep the random weights."""


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    torch.save(RandomInception("x", ["2048"], feature_extractor_weights_path=file).state_dict(), file)
    return file


def test_inception_features_are_the_librarys(folder: Path, inception: Path, tmp_path: Path) -> None:
    images = Images(folder, Images.read(folder).files[:2], ())
    found = judged(InceptionJudge(str(inception), None, False, "cpu"), images, tmp_path, in_threads)["features"]
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=inception)
    from torchvision.io import read_image

    assert torch.equal(found[1:], network(read_image(str(images.files[1]))[None])[0])
    with pytest.raises(ValueError, match="patch FID needs 299 pixels"):
        judged(InceptionJudge(str(inception), None, True, "cpu"), images, tmp_path, in_threads)


def test_lpips_is_the_librarys_and_prompts_are_never_parted(folder: Path, tmp_path: Path) -> None:
    network = LPIPS(net="alex", pnet_rand=True, verbose=False)
    torch.save(
        {f"features.{k.split('.', 1)[1]}": v for k, v in network.net.state_dict().items()}, tmp_path / "alex.pth"
    )
    images, judge = Images.read(folder), LpipsJudge(str(tmp_path / "alex.pth"), 64, "cpu")
    found = judged(judge, images, tmp_path, in_threads, batch=3)["diversity"]
    first, second = (
        torch.from_numpy(np.array(ImageOps.fit(Image.open(file), (64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        for file in images.files[2:4]
    )
    expected = network(first[None] / 127.5 - 1, second[None] / 127.5 - 1).item()
    assert expected > 0
    torch.testing.assert_close(found[2:4], torch.full((2,), expected))
    single = replace(images, files=images.files[:1], prompts=images.prompts[:1])
    assert diversity(judged(judge, single, tmp_path, in_threads), single.prompts) is None
    with pytest.raises(ValueError, match="add --resize 64"):
        judged(replace(judge, resize=None), images, tmp_path, in_threads)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not torchvision's AlexNet"):
        judged(replace(judge, weights=str(tmp_path / "other.pth")), images, tmp_path, in_threads)


def test_the_command_compares_folders(
    export: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "one step", tmp_path / "figures.json"
    drawn(export, other, steps=1)
    real = ["--real", str(folder), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert main(["score", str(folder), str(other), "--reward", "pickscore", "second:pickscore", *real]) == 0
    first, second = json.loads(out.read_text())
    assert first["distances"] == {
        "CMMD (pickscore)": pytest.approx(0, abs=1e-9),
        "CMMD (second)": pytest.approx(0, abs=1e-9),
    }
    gap = second["scores"]["pickscore"]["mean"] - first["scores"]["pickscore"]["mean"]
    assert second["against the first"]["pickscore"]["difference"]["mean"] == pytest.approx(gap, abs=1e-5)
    assert f"{other} against {folder}, pickscore: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["score", "{folder}", "--reward", "pickscore={empty}"], "config.json is missing"),
        (["score", "{folder}", "{few}", "--reward", "pickscore"], "draw what is missing"),
        (["score", "{folder}", "--inception", "{empty}/x.pth", "--real", "{folder}"], "there is no file"),
        (["score", "{folder}", "--lpips", "{empty}/x.pth"], "there is no file"),
        (["score", "{empty}", "--reward", "pickscore"], "there are no images"),
        (["score", "{folder}"], "nothing judges"),
        (["sample", "{empty}", "--prompts", "{empty}/p.txt", "--out", "{empty}/x"], "not a pipeline of diffusers"),
        (["sample", "{export}", "--prompts", "{empty}/p.txt", "--out", "{empty}/x"], "no such file"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    arguments: list[str], line: str, export: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in ("000000.png", "000000.txt"):
        (few / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "empty").mkdir()
    places = {"folder": folder, "few": few, "export": export, "empty": tmp_path / "empty"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert line in said[0]


def test_distances_in_closed_form() -> None:
    a, b = torch.eye(8)[0].repeat(1000, 1), torch.eye(8)[1].repeat(1000, 1)
    assert cmmd(a[:5], b[:7]) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    assert kid(a, b) == pytest.approx(1000 * ((1 + 1 / 8) ** 3 * 2 - 2), rel=1e-5)
    x, y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    assert fid(x, y) == frechet_distance(x, y)
    assert fid(x[:8], y) is None
    assert kid(x, y) is None
    assert diversity({"features": torch.tensor([[0.0], [2.0], [5.0]])}, ["p", "p", "q"]) == 2
    assert diversity({"features": x[:2]}, ["p", "q"]) is None


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=20), st.lists(st.integers(-9, 9), min_size=20, max_size=20))
def test_a_paired_comparison_turns_its_sign_with_the_models(left: list[int], right: list[int]) -> None:
    a, b = torch.tensor(left, dtype=torch.float32), torch.tensor(right[: len(left)], dtype=torch.float32)
    one, other = paired(a, b), paired(b, a)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.wins == pytest.approx(1 - other.wins)
    assert one.p == pytest.approx(other.p)
    assert one.difference.low <= one.difference.mean <= one.difference.high


def test_a_bootstrap_interval_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    found = bootstrap_mean(values)
    half = 1.96 * values.std().item() / 4000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
