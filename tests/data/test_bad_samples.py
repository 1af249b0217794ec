"""Bad samples are left out or replaced, counted by reason and named; too many of them stop a run."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from scenes_on_disk import encoded, pictures, samples, tar_members, write_folder, write_parquet, write_tar

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.build import build_images, open_image_reader
from flashdmd_ray.data.formats import Columns, open_images, open_prompts
from flashdmd_ray.data.formats.folder import NO_NAME
from flashdmd_ray.data.index import open_index, scan_piece
from flashdmd_ray.data.sample import NOT_UTF8, Bad, Ignored, Sample
from flashdmd_ray.data.tally import NAMES, Tally
from flashdmd_ray.training.data_report import note_replaced, start_report

SIZE = (24, 24)
GOOD = samples(1)[0][1]


def judged(path, cache):
    index = open_index(open_images(str(path), Columns()), cache)
    return index, {reason: (named.count, named.names) for reason, named in index.tally.bad.items()}


def test_every_kind_in_an_image_folder(tmp_path, cache):
    outside = tmp_path / "secret.png"
    outside.write_bytes(GOOD)
    lines = [
        {"file_name": "gone.png", "text": "no such file"},
        {"file_name": "../secret.png", "text": "out of the folder"},
        {"file_name": str(outside), "text": "an absolute path"},
        {"file_name": "link.png", "text": "a link to the outside"},
        {"file_name": "inner.png", "text": "a link to a good image inside"},
        {"file_name": "empty.png", "text": "zero bytes"},
        {"file_name": "page.png", "text": "a web page"},
        {"file_name": "sub", "text": "a folder"},
        {"file_name": "nul\0.png", "text": "a name no file can have"},
        {"file_name": "wrong.png", "text": "a JPEG called PNG is fine"},
        {"file_name": "a.png"},
        {"file_name": "b.png", "text": "   "},
        {"file_name": "c.png", "text": 7},
        {"file_name": "d.png", "text": "half a pair \ud800"},
        {"file_name": "e.png", "text": "x" * 70_000},
        {"file_name": "f.png", "text": "long but fine " * 40},
        {"file_name": "000.png", "text": "once more"},
        "{not json",
        ["no", "object"],
        {"text": "no name"},
    ]
    root = write_folder(tmp_path / "data", samples(3), lines)
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "000.png")
    (root / "empty.png").touch()
    (root / "page.png").write_bytes(b"<html>404</html>")
    (root / "sub").mkdir()
    (root / "wrong.png").write_bytes(encoded(pictures(1)[0][1], "JPEG"))
    for name in "abcdef":
        (root / f"{name}.png").write_bytes(GOOD)
    (root / "unlisted.jpg").write_bytes(GOOD)
    (root / ".hidden.jpg").write_bytes(GOOD)
    index, bad = judged(root, cache)
    assert bad == {
        "missing image": (3, ["gone.png", "sub", "nul\\x00.png"]),
        "leaves the data folder": (3, ["../secret.png", str(outside), "link.png"]),
        "empty image file": (1, ["empty.png"]),
        "web page instead of the image": (1, ["page.png"]),
        "missing caption": (2, ["a.png", "unlisted.jpg"]),
        "empty caption": (1, ["b.png"]),
        "caption is not text": (1, ["c.png"]),
        NOT_UTF8: (1, ["d.png"]),
        "caption longer than 65536 characters": (1, ["e.png"]),
        "duplicate key": (1, ["000.png"]),
        "broken line": (2, [f"metadata.jsonl line {n}" for n in (21, 22)]),
        NO_NAME.format("file_name"): (1, ["metadata.jsonl line 23"]),
    }
    assert [index.sample(i).key for i in range(len(index))] == [
        *("000.png", "001.png", "002.png"),
        *("inner.png", "wrong.png", "f.png"),
    ]
    assert index.tally.good == len(index)
    assert index.tally.notes["caption longer than 300 characters"].names == ["f.png"]


def test_every_kind_in_an_archive(tmp_path, cache):
    data = samples(3)
    path = write_tar(
        tmp_path / "a.tar",
        [
            *tar_members(data),
            ("../../etc/evil.png", GOOD),
            ("../../etc/evil.txt", b"climbs"),
            ("/abs.png", GOOD),
            ("/abs.txt", b"absolute"),
            ("lonely.txt", b"no image"),
            ("silent.png", GOOD),
            ("latin.png", GOOD),
            ("latin.txt", "größe".encode("latin-1")),
            ("json.png", GOOD),
            ("json.json", b"{broken"),
            ("nojson.png", GOOD),
            ("nojson.json", b'{"width": 3}'),
            ("00000.png", GOOD),
            ("00000.txt", b"a second time"),
            ("zero.png", b""),
            ("zero.txt", b"nothing"),
        ],
    )
    import tarfile

    with tarfile.open(path, "a") as archive:
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "00001.png"
            archive.addfile(link)
            text = tarfile.TarInfo(name.replace("png", "txt"))
            text.size = 4
            archive.addfile(text, __import__("io").BytesIO(b"link"))
    index, bad = judged(path, cache)
    assert {reason: names for reason, (_, names) in bad.items()} == {
        "leaves the data folder": ["a.tar:../../etc/evil", "a.tar:/abs"],
        "missing image": ["a.tar:lonely"],
        "missing caption": ["a.tar:silent", "a.tar:nojson"],
        NOT_UTF8: ["a.tar:latin"],
        "broken JSON": ["a.tar:json"],
        "duplicate key": ["a.tar:00000"],
        "empty image file": ["a.tar:zero"],
        "link or special file in the archive": ["a.tar:soft"],
    }
    assert index.captions([3]) == ("link",), "a hard link is another name of a file in the same archive"


@pytest.mark.parametrize("cut", ["in a body", "in a header", "between members", "after half a block"])
def test_a_cut_archive_keeps_what_is_whole_and_is_named(tmp_path, cache, cut):
    whole = write_tar(tmp_path / "w.tar", tar_members(samples(4)))
    import tarfile

    with tarfile.open(whole) as archive:
        third = archive.getmember("00002.png")
        end = archive.getmember("00003.png").offset
    lengths = {
        "in a body": third.offset_data + third.size // 2,
        "in a header": third.offset + 200,
        "between members": end,
        "after half a block": end + 256,
    }
    kept = 3 if cut in ("between members", "after half a block") else 2
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[: lengths[cut]])
    index, bad = judged(path, cache)
    assert len(index) == kept
    assert bad["archive cut short"] == (1, ["cut.tar"])


def test_an_archive_that_is_none(tmp_path, cache):
    (tmp_path / "no.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=r"no usable sample in this webdataset tar: archive cut short: 1 \(no.tar\)"):
        judged(tmp_path / "no.tar", cache)


def test_every_kind_in_a_table(tmp_path, cache):
    data = [*samples(2), ("", GOOD), (None, GOOD), ("no bytes", None), ("a page", b"<html>")]
    index, bad = judged(write_parquet(tmp_path / "t", data, group=2), cache)
    assert len(index) == 2
    assert {reason: count for reason, (count, _) in bad.items()} == {
        "empty caption": 1,
        "missing caption": 1,
        "missing image": 1,
        "web page instead of the image": 1,
    }
    assert bad["empty caption"][1] == ["a.parquet group 1 row 0"]


def test_a_damaged_row_group_is_lost_alone(tmp_path, cache):
    """Bytes in the middle of a table overwritten: its other row groups are read."""
    root = write_parquet(tmp_path / "t", samples(24), group=4)
    path = root / "a.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 300 : middle + 300] = b"\xff" * 600
    path.write_bytes(content)
    index, bad = judged(root, cache)
    assert bad["damaged row group"][0] + bad.get("not an image", (0,))[0] == 24 - len(index)
    assert len(index) >= 16


def test_bad_prompts_are_counted(tmp_path, cache):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a red 4"}\n{"text": ""}\nbroken\n{"other": 1}\n')
    tally = open_index(open_prompts(str(path), Columns()), cache).tally
    assert (tally.samples, tally.bad_count) == (4, 3)
    assert tally.bad["broken line"].names == ["p.jsonl line 3"]


def cut_bodies(tmp_path, count, cut):
    """A folder whose images `cut` lost the second half of their bytes: their headers are whole."""
    data = samples(count)
    cut_short = [(c, image[: len(image) // 2]) if i in cut else (c, image) for i, (c, image) in enumerate(data)]
    return write_folder(tmp_path / "cut", cut_short), data


def test_a_damaged_body_is_replaced_by_the_next_good_sample(tmp_path, cache, caplog):
    root, data = cut_bodies(tmp_path, 12, {3, 4, 11})
    source = build_images(DataConfig(source=str(root), cache=cache), 5)
    order = source.images.numbers(range(12))
    with caplog.at_level(logging.WARNING):
        reals = source.reals(torch.arange(12), SIZE)
    expected = [{3: 5, 4: 5, 11: 0}.get(number, number) for number in order]
    assert reals.captions == tuple(data[number][0] for number in expected)
    assert reals.replaced == 3
    assert reals.images.shape == (12, 3, 24, 24)
    assert [r.getMessage() for r in caplog.records if "003.png" in r.getMessage()] == [
        "003.png: truncated or damaged image; the next image takes its place"
    ]
    met = source.report()
    assert met.bad_count == 3
    assert sorted(met.pairs()) == [f"truncated or damaged image\t{n:03}.png" for n in (3, 4, 11)]


def test_more_than_one_percent_damaged_bodies_stop_the_run(tmp_path, cache):
    root, _ = cut_bodies(tmp_path, 50, {3, 20})
    source = build_images(DataConfig(source=str(root), cache=cache), 5)
    source.reals(torch.arange(50), SIZE)  # 2 of 50 are too few images to judge
    with pytest.raises(
        ValueError, match=r"4 of 100 images could not be decoded \(4.0%, allowed 1.0%\): truncated or damaged"
    ) as error:
        source.reals(torch.arange(50, 100), SIZE)
    assert "003.png" in str(error.value)
    assert "020.png" in str(error.value)
    patient = build_images(DataConfig(source=str(root), cache=cache, max_bad_fraction=0.05), 5)
    assert patient.reals(torch.arange(100), SIZE).replaced == 4


def test_nothing_readable_ends_at_once(tmp_path, cache):
    root, _ = cut_bodies(tmp_path, 4, {0, 1, 2, 3})
    source = build_images(DataConfig(source=str(root), cache=cache), 5)
    with pytest.raises(ValueError, match=r"4 samples in a row cannot be decoded.*flashdmd data --check"):
        source.reals(torch.arange(2), SIZE)


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_one_percent_is_the_limit(tmp_path, cache, bad, stops):
    """1 of 100 is allowed, 2 of 101 are not."""
    lines = [{"file_name": f"gone-{i}.png", "text": "x"} for i in range(bad)]
    root = write_folder(tmp_path / "f", samples(1) * 99, lines)
    config = DataConfig(source=str(root), cache=cache)
    if not stops:
        assert len(open_image_reader(config, 0)) == 99
        return
    with pytest.raises(
        ValueError, match=r"2 of 101 samples are bad \(2.0%, allowed 1.0%\): missing image: 2 \(gone-0.png"
    ):
        open_image_reader(config, 0)
    assert len(open_image_reader(DataConfig(source=str(root), cache=cache, max_bad_fraction=0.02), 0)) == 99


def test_a_report_counts_all_and_names_five():
    tally = Tally()
    for number in range(12):
        tally.add(Bad(f"sample {number}\n", "gone"))
    tally.add(Sample("fine", "a caption"))
    other = Tally()
    other.add(Bad("elsewhere", "cut"))
    other.add(Ignored(".DS_Store", "junk"))
    tally.merge(other)
    assert tally.bad["gone"].count == 12
    assert tally.bad["gone"].names == [f"sample {n}\\n" for n in range(NAMES)]
    assert tally.lines()[0].startswith("gone: 12 (sample 0\\n, ")
    assert tally.lines()[0].endswith(", ...)")
    assert (tally.samples, tally.bad_count) == (14, 13)
    assert tally.ignored_lines() == ["junk: 1 (.DS_Store)"]
    assert Tally.from_json(json.loads(json.dumps(tally.as_json()))) == tally


def test_the_report_of_a_run(tmp_path, cache, caplog):
    root = write_folder(tmp_path / "f", samples(1) * 150, [{"file_name": "gone.png", "text": "x"}])
    config, run = DataConfig(source=str(root), cache=cache), tmp_path / "run"
    run.mkdir()
    with caplog.at_level(logging.WARNING):
        metrics = start_report(run, config)
    assert metrics == {"data/source_samples": 150, "data/source_bad": 1}
    assert "data.source: left out: missing image: 1 (gone.png)" in caplog.text
    note_replaced(run, ["truncated or damaged image\t3.png"])
    note_replaced(run, ["truncated or damaged image\t3.png", "truncated or damaged image\t4.png"])
    report = json.loads((run / "data_report.json").read_text())
    assert report["source"]["bad"] == {"missing image": {"count": 1, "names": ["gone.png"]}}
    assert report["replaced"]["truncated or damaged image"] == {"count": 2, "names": ["3.png", "4.png"]}
    start_report(run, config)  # resumed
    assert json.loads((run / "data_report.json").read_text()) == report
    (root / "000.png").write_bytes(encoded(Image.fromarray(np.zeros((24, 24, 3), np.uint8)), "PNG"))
    with pytest.raises(ValueError, match="has changed since this run began"):
        start_report(run, config)


def test_the_demo_has_no_report(tmp_path):
    assert start_report(tmp_path, DataConfig()) == {}
    note_replaced(tmp_path, ())
    assert not list(tmp_path.iterdir())


def test_a_scan_is_the_same_every_time(written):
    format = open_images(str(written["folder"]), Columns())
    assert scan_piece(format, 0) == scan_piece(format, 0)
