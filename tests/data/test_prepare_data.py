"""The command: a table, a verdict and an exit code."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scenes_on_disk import samples, tar_members, write_folder, write_tar

from flashdmd_ray.commands.prepare_data import prepare_data_command
from flashdmd_ray.config import DataConfig
from flashdmd_ray.data import build_images


@pytest.fixture
def command(tmp_path, capsys):
    def run(*arguments):
        code = prepare_data_command([*map(str, arguments), "--set", f"data.cache={tmp_path / 'cache'}"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_good_data_set(command, tmp_path):
    code, out, err = command(write_folder(tmp_path / "f", samples(30)), "--set", "model.resolution=[24,48]")
    assert (code, err) == (0, "")
    assert "samples     30, of which 0 bad" in out
    assert "width       24 to 24, median 24 pixels" in out
    assert "shapes      3:4 to 4:3: 30" in out
    assert "at 48 x 24  50% of an image is left by the crop; 30 must be enlarged" in out
    assert "verdict     usable" in out


def test_damaged_bodies_are_found_and_refused(command, tmp_path):
    data = samples(30)
    data[3] = (data[3][0], data[3][1][:100])
    root = write_folder(tmp_path / "f", data, [{"file_name": "gone.png", "text": "x"}])
    code, out, _ = command(root, "--check")
    assert code == 1
    assert "samples     31, of which 2 bad" in out
    assert "truncated or damaged image: 1 (003.png)" in out
    assert "missing image: 1 (gone.png)" in out
    assert "refused: 6.5% bad, allowed 1.0%" in out
    code, out, _ = command(root, "--check", "--set", "data.max_bad_fraction=0.1")
    assert code == 0
    assert "usable: 2 bad samples will be left out or replaced" in out


def test_a_cut_archive_is_refused_whatever_its_share(command, tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members(samples(5)))
    path.write_bytes(path.read_bytes()[:-11000])
    code, out, _ = command(path, "--check", "--set", "data.max_bad_fraction=0.5")
    assert code == 1
    assert "refused: archive cut short: nobody knows how much is lost" in out


def test_prompts_are_judged_too(command, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red 4\n" * 200 + "long " * 100 + "\n")
    code, out, _ = command(path)
    assert code == 0
    assert "samples     201, of which 0 bad" in out
    assert "captions    7 to 499, median 7 characters; 1 long ones, which tokenizers cut" in out


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_table_without_images_is_prompts(command, tmp_path, as_folder):
    (tmp_path / "prompts").mkdir()
    file = tmp_path / "prompts" / "p.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["a red 4", None, "two 7s"]}), file)
    code, out, _ = command(file.parent if as_folder else file, "--set", "data.max_bad_fraction=0.5")
    assert code == 0
    assert "format      parquet prompts" in out
    assert "samples     3, of which 1 bad" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "does not exist"),
        (("nowhere", "--embeddings"), "--out: name the folder"),
        (("nowhere", "--latents", "--out", "x", "--model", "/no/where"), "model.teacher: no such directory"),
        (("nowhere", "--workers", "0"), "data.workers"),
        (("p.txt", "--teacher-images", "5"), "--out: name the folder"),
        (("nowhere", "--set", "data.colour=red"), "data.colour"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_precomputing_without_usable_data_is_refused(command, tmp_path):
    data = [(caption, image[:60]) for caption, image in samples(4)]
    code, _, err = command(write_folder(tmp_path / "f", data), "--latents", "--out", tmp_path / "out")
    assert code == 2
    assert "in a row cannot be decoded" in err
    assert not (tmp_path / "out" / "latents" / "manifest.json").exists()


def test_prompts_alone_become_images_that_a_run_reads(command, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red 4 on a gray background\na blue 7 on a white background\n")
    draw = (
        prompts,
        "--teacher-images",
        5,
        "--config",
        "demo",
        "--out",
        out,
        "--set",
        "evaluation={teacher_steps: 2, batch: 2}",
    )
    code, said, _ = command(*draw)
    assert code == 0
    assert f"data.source={out / 'images'}" in said
    pictures = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert len(set(pictures.values())) == 5, "a prompt that comes again has other noise"
    (out / "images" / "000003.txt").unlink()  # as an interrupted call leaves it
    assert command(*draw)[0] == 0
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == pictures
    source = build_images(DataConfig(source=str(out / "images"), cache=tmp_path / "cache"), seed=0)
    reals = source.reals(torch.arange(5), (24, 24))
    assert sorted(reals.captions) == sorted((prompts.read_text().splitlines() * 3)[:5])
    code, _, err = command(*draw, "evaluation.guidance_scale=3")
    assert code == 2
    assert "drawn in another way" in err


@pytest.mark.usefixtures("ray_cluster")
def test_the_check_on_ray_says_the_same(command, tmp_path):
    data = samples(30)
    data[3] = (data[3][0], data[3][1][:100])
    root = write_folder(tmp_path / "f", data)
    here = command(root, "--check")
    there = command(root, "--check", "--runtime", "ray", "--set", f"data.cache={tmp_path / 'cache2'}")
    assert here[:2] == there[:2]
    assert here[0] == 1
