"""Tar archives: samples are joined by name, and damage is found, whatever its share."""

import gzip
import json
import tarfile

import pytest
from scenes_on_disk import write_tar

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.datasets import accepted_index, image_format
from flashdmd_ray.data.formats import Columns
from flashdmd_ray.data.sample import AFTER_END
from tests.data.layouts import IMAGE, counts, judge, tar_bytes


def test_members_of_a_webdataset_sample(tmp_path):
    text = json.dumps({"caption": None, "text": "a mask"}).encode()
    path = write_tar(
        tmp_path / "a.tar",
        [
            *(("x.seg.png", IMAGE), ("x.cls", b"3"), ("x.JPG", IMAGE), ("x.json", text)),
            *(("y.seg.png", IMAGE), ("y.json", b'{"caption": ["one", "two"]}')),
            *(("z.png", IMAGE), ("z.jpg", IMAGE), ("z.txt", b"which?")),
            *(("deep.png", IMAGE), ("deep.json", b"[" * 50_000)),
            ("z.late.txt", b"nothing's"),
        ],
    )
    captions, tally = judge(path)
    assert captions == {"a.tar:x": "a mask", "a.tar:y": "one"}
    assert sorted(counts(tally.bad).values()) == [1, 1, 2]
    assert counts(tally.ignored) == {"further image of a sample": 1, "neither image nor caption (.cls)": 1}
    assert [note.split(",")[0] for note in tally.notes] == ["list of captions"]
    captions, _ = judge(path, Columns(image="jpg"))
    assert captions == {"a.tar:x": "a mask", "a.tar:z": "which?"}


def test_members_in_any_order(tmp_path):
    members = [*((f"{n}.txt", f"text {n}".encode()) for n in range(4)), *((f"{n}.png", IMAGE) for n in range(4))]
    captions, tally = judge(write_tar(tmp_path / "a.tar", members))
    assert captions == {f"a.tar:{n}": f"text {n}" for n in range(4)}
    assert not tally.bad


def test_archives_joined_into_one_file_are_all_read(tmp_path):
    (tmp_path / "cat.tar").write_bytes(b"".join(tar_bytes(tmp_path, prefix, 3) for prefix in "abc"))
    assert judge(tmp_path / "cat.tar")[1].good == 9


def test_bytes_after_the_end_are_refused_whatever_their_share(tmp_path):
    path = tmp_path / "rest.tar"
    path.write_bytes(tar_bytes(tmp_path, "a", 3) + b"no archive" * 100)
    _, tally = judge(path)
    assert (tally.good, counts(tally.bad)) == (3, {AFTER_END: 1})
    config = DataConfig(source=str(path), cache=tmp_path / "cache", max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="nobody knows how much is lost"):
        accepted_index(config, "source", image_format(config))


def test_a_packed_archive_under_a_plain_name_is_called_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(tmp_path, "a", 3)))
    assert list(judge(tmp_path / "a.tar")[1].bad) == ["gzip file called .tar; unpack it to a plain .tar"]


def test_absurd_sizes_in_an_archive_are_a_cut(tmp_path):
    info = tarfile.TarInfo("x.png")
    info.size = 2**62
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert counts(judge(tmp_path / "a.tar")[1].bad) == {"archive cut short": 1}
