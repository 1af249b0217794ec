"""Data as people have it: every image is good, bad for a reason, or ignored for a reason; none is lost and none gets another's caption."""

import gzip
import io
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from scenes_on_disk import write_tar

from flashdmd_ray.config import DataConfig, load_config
from flashdmd_ray.data.build import build_images, open_reals
from flashdmd_ray.data.formats import Columns, open_images, open_prompts
from flashdmd_ray.data.formats.folder import NO_NAME
from flashdmd_ray.data.formats.names import ABSENT_SHARD, NO_CAPTION, OTHER_LIST
from flashdmd_ray.data.pixels import FURTHER_FRAME, decode
from flashdmd_ray.data.sample import NOT_UTF8, NULS, SYSTEM_FILE
from tests.data.layouts import IMAGE, SYSTEM, counts, folder, judge, picture, write_files


def test_dots_in_names_join_nothing(tmp_path):
    members = [(f"{n:03}.{s}", c) for n in range(5) for s, c in (("png", IMAGE), ("txt", b"plain"))]
    members += [(f"shot.{n:03}.{s}", c) for n in range(20) for s, c in (("png", IMAGE), ("txt", f"shot {n}".encode()))]
    captions, tally = judge(write_tar(tmp_path / "a.tar", members))
    assert (tally.good, tally.bad, tally.ignored) == (25, {}, {})
    assert captions["a.tar:shot.007"] == "shot 7"
    _, tally = judge(
        write_tar(tmp_path / "b.tar", [*((f"shot.{n}.png", IMAGE) for n in range(20)), ("shot.txt", b"x")])
    )
    assert (tally.good, tally.bad_count) == (0, 20)


def test_files_of_operating_systems_are_no_samples(tmp_path):
    good = {f"{n}.{s}": c for n in range(3) for s, c in (("png", IMAGE), ("txt", b"t"))}
    files = good | dict.fromkeys(SYSTEM, b"system")
    members = [m for pair in zip([(f"./{n}", c) for n, c in files.items()], strict=True) for m in pair]
    _, tally = judge(write_tar(tmp_path / "tars" / "a.tar", members))
    assert (tally.good, tally.bad, counts(tally.ignored)) == (3, {}, {SYSTEM_FILE: len(SYSTEM)})
    _, tally = judge(write_files(tmp_path / "folder", files))
    assert (tally.good, tally.bad) == (3, {})
    (tmp_path / "tars" / "._a.tar").write_bytes(b"system")
    assert judge(tmp_path / "tars")[1].good == 3


def test_text_files_beside_images(tmp_path):
    root = folder(
        tmp_path / "f",
        a__jpg=IMAGE,
        a__txt="\ufeffwindows\r\n",
        b__PNG=IMAGE,
        b__TXT="upper case",
        c__webp=IMAGE,
        c__caption="kohya",
        d__png=IMAGE,
        d__json='{"prompt": "a field"}',
        e__png=IMAGE,
        e__png__txt="whole name",
        f__png=IMAGE,
        g__txt="no image",
        h__heic=b"apple",
        h__txt="of an image that is not read",
        i__png=IMAGE,
        i__txt=b"\xff\xfe" + "utf-16".encode("utf-16-le"),
        j__png=IMAGE,
        j__txt="größe".encode("latin-1"),
    )
    os.mkfifo(root / "pipe.png")
    (root / "pipe.txt").write_text("a pipe")
    captions, tally = judge(root)
    assert captions == {
        "a.jpg": "windows",
        "b.PNG": "upper case",
        "c.webp": "kohya",
        "d.png": "a field",
        "e.png": "whole name",
        "i.png": "utf-16",
    }
    assert counts(tally.bad) == {"missing caption": 1, "missing image": 1, NOT_UTF8: 1} | {
        "not an image": 1,
        "not a plain file": 1,
    }
    assert not tally.ignored


def test_names_that_look_equal_are_equal(tmp_path):
    """A Mac writes letters with accents as two characters, everyone else as one."""
    one, two = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))
    root = write_files(tmp_path / "side", {f"{one}.png": IMAGE, f"{two}.txt": "beside"})
    assert list(judge(root)[0].values()) == ["beside"]
    lines = json.dumps({"file_name": f"{one}.png", "text": "listed"})
    root = write_files(tmp_path / "list", {f"{two}.png": IMAGE, "metadata.jsonl": lines})
    captions, tally = judge(root)
    assert captions == {f"{two}.png": "listed"}
    assert not tally.bad


def test_names_in_metadata(tmp_path):
    root = tmp_path / "f"
    rows = [
        {"file_name": "train\\0.png"},
        {"file_name": "train\\1.png", "caption": None, "text": "windows"},
        {"file_name": str(root / "train/2.png"), "text": ["a list", "of captions"]},
        {"file_name": "./train/3.png", "text": "dots"},
    ]
    text = "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows))
    write_files(root, {"metadata.jsonl": text} | {f"train/{n}.png": IMAGE for n in range(4)})
    captions, tally = judge(root)
    assert captions == {"train/1.png": "windows", "train/2.png": "a list", "train/3.png": "dots"}
    assert counts(tally.bad) == {"missing caption": 1}


@pytest.mark.parametrize(
    "text",
    [
        '[{"file_name": "0.png", "text": "a"},\n {"file_name": "1.png", "text": "b"}]',
        '[\n {\n  "file_name": "0.png",\n  "text": "a"\n },\n {"file_name": "1.png", "text": "b"}\n]\n',
        '{"file_name": "0.png", "text": "a"},\n\n{"file_name": "1.png", "text": "b"},\n',
        '{"file_name": "0.PNG", "text": "a"}\n{"file_name": ".\\\\1.Png", "text": "b"}\n',
    ],
)
def test_lists_commas_and_letter_case_lose_no_row(text, tmp_path):
    root = write_files(tmp_path, {"0.png": IMAGE, "1.png": IMAGE, "metadata.jsonl": text})
    captions, tally = judge(root)
    assert captions == {"0.png": "a", "1.png": "b"}
    assert tally.samples == 2


def test_only_metadata_files_are_lists(tmp_path):
    lines = '{"file_name": "0.png", "text": "a"}'
    root = write_files(
        tmp_path, {"0.png": IMAGE, "Metadata.JSONL": lines, "old_metadata.jsonl": lines, "x.metadata.csv": "a,b"}
    )
    captions, tally = judge(root)
    assert captions == {"0.png": "a"}
    assert tally.samples == 1
    (root / "metadata.csv").write_text("file_name,text\n0.png,b\n")
    with pytest.raises(ValueError, match=r"holds Metadata\.JSONL and metadata\.csv in one folder"):
        open_images(str(root), Columns())


def test_a_letter_case_that_could_be_two_files_is_missing(tmp_path):
    lines = '{"file_name": "A.png", "text": "a"}'
    root = write_files(tmp_path, {"a.PNG": IMAGE, "a.png": IMAGE, "metadata.jsonl": lines})
    assert counts(judge(root)[1].bad) == {"missing image": 1, "missing caption": 2}


def test_what_is_about_the_data_is_no_caption(tmp_path):
    about = {"README.txt": "x", "LICENSE.txt": "y", "a/metadata.json": "[]", "captions.txt": "one\ntwo"}
    root = write_files(
        tmp_path, {"0.png": IMAGE, "0.txt": "t", "index.png": IMAGE, "index.txt": "u", "lost.txt": "v", **about}
    )
    captions, tally = judge(root)
    assert captions == {"0.png": "t", "index.png": "u"}
    assert counts(tally.bad) == {"missing image": 1}
    assert counts(tally.ignored) == {NO_CAPTION: 2, OTHER_LIST: 2}


def test_the_caption_is_the_file_that_holds_a_text(tmp_path):
    files = {
        "0.png": IMAGE,
        "0.txt": " \n",
        "0.json": '{"caption": "of the JSON"}',
        "1.png": IMAGE,
        "1.txt": "",
        "2.png": IMAGE,
    }
    root = write_files(tmp_path, files | {"2.txt": "utf-16".encode("utf-16-le")})
    captions, tally = judge(root)
    assert captions == {"0.png": "of the JSON"}
    assert counts(tally.bad) == {"empty caption": 1, NULS: 1}


def test_metadata_in_every_split(tmp_path):
    files = {f"{split}/metadata.csv": f"file_name,text\n0.png,of {split}\n" for split in ("train", "test")}
    captions, _ = judge(write_files(tmp_path, files | {f"{split}/0.png": IMAGE for split in ("train", "test")}))
    assert captions == {"test/0.png": "of test", "train/0.png": "of train"}


def test_rows_of_a_csv_are_whole_or_broken(tmp_path):
    text = (
        'file_name;text\n0.png;"a ""word""\nand a line"\n1.png;too;many\n2.png\n\n3.png;fine\n4.png;"open\n5.png;lost\n'
    )
    root = write_files(tmp_path, {"metadata.csv": text} | {f"{n}.png": IMAGE for n in range(6)})
    captions, tally = judge(root)
    assert captions == {"0.png": 'a "word"\nand a line', "3.png": "fine"}
    assert counts(tally.bad) == {"broken line": 3, "missing caption": 4}


def test_a_field_given_twice_makes_a_row_bad(tmp_path):
    """A reader that takes the last one would train on a caption that nobody chose. NaN is what pandas writes for an empty cell."""
    rows = '{"file_name": "0.png", "text": "a", "text": "b"}\n{"file_name": "1.png", "text": "c", "score": NaN}\n'
    listed = f"[{rows.strip()}]".replace("\n", ",\n")
    for name, text in (("f", rows), ("list", listed)):
        captions, tally = judge(write_files(tmp_path / name, {"0.png": IMAGE, "1.png": IMAGE, "metadata.jsonl": text}))
        assert captions == {"1.png": "c"}
    assert counts(tally.bad) == {"broken line": 1, "missing caption": 1}
    beside = {
        "0.png": IMAGE,
        "0.json": '{"text": "a", "text": "b"}',
        "1.png": IMAGE,
        "1.json": '{"text": "c", "score": NaN}',
    }
    archive = write_tar(tmp_path / "a.tar", [(n, c if isinstance(c, bytes) else c.encode()) for n, c in beside.items()])
    captions, tally = judge(archive)
    assert captions == {"a.tar:1": "c"}
    assert counts(tally.bad) == {"broken JSON": 1}


def test_images_without_captions_where_prompts_are_others(tmp_path):
    root = write_files(tmp_path / "f", {f"{n}.png": picture(n) for n in range(4)} | {"0.txt": "one"})
    (tmp_path / "p.txt").write_text("a prompt\n")
    alone = DataConfig(source=str(root), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="missing caption: 3"):
        build_images(alone, 0)
    settings = [
        f"data.source={root}",
        f"data.cache={tmp_path / 'cache'}",
        f"data.prompts={tmp_path / 'p.txt'}",
        "runtime=local",
    ]
    config = load_config(None, settings)
    assert len(build_images(config.data, 0)) == 4
    with pytest.raises(
        ValueError, match=r"3 of 4 images have no caption; add captions .*adversarial\.prompt_projection"
    ):
        open_reals(load_config(None, [*settings, "adversarial.prompt_projection=true"]), None)


def test_a_snapshot_of_the_hub_reads_its_blobs(tmp_path):
    snapshot = write_files(tmp_path / "datasets--me--x/snapshots/abc", {"0.txt": "linked"})
    write_files(tmp_path / "datasets--me--x/blobs", {"f00": IMAGE})
    (snapshot / "0.png").symlink_to("../../blobs/f00")
    assert judge(snapshot)[0] == {"0.png": "linked"}


def test_the_column_is_the_one_that_holds_texts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [IMAGE] * 3, "caption": pa.nulls(3, pa.string()), "text": ["a", None, "c"]})
    pq.write_table(table, tmp_path / "t.parquet")
    captions, tally = judge(tmp_path / "t.parquet")
    assert sorted(captions.values()) == ["a", "c"]
    assert counts(tally.bad) == {"missing caption": 1}
    captions, _ = judge(tmp_path / "t.parquet", opened=open_prompts)
    assert sorted(captions.values()) == ["a", "c"]
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "joined.parquet").write_bytes(data + data)
    with pytest.raises(ValueError, match="several parquet files joined into one"):
        judge(tmp_path / "joined.parquet")


def test_prompts_of_windows(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("größe\r\n\r\n# one\rtwo".encode("utf-16"))
    captions, tally = judge(path, opened=open_prompts)
    assert list(captions.values()) == ["größe", "# one", "two"]
    assert counts(tally.ignored) == {"blank line": 1}
    assert [note[:30] for note in tally.notes] == ["prompt that begins with '#'; a"]
    path.write_bytes("größe\nfine\n".encode("latin-1"))
    assert counts(judge(path, opened=open_prompts)[1].bad) == {NOT_UTF8: 1}


def test_metadata_of_a_picture_is_no_reason_to_lose_it(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * 3_000_000, zip=True)
    notes.add_itxt("xmp", "y" * 2_000_000)
    assert decode(picture(200, pnginfo=notes, icc_profile=os.urandom(1_500_000)), (8, 8)).mean() == 200
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "lfs.txt").write_text("a pointer")
    assert list(judge(tmp_path)[1].bad) == ["Git LFS pointer instead of the image"]


def frames(format, count=4):
    file = io.BytesIO()
    pictures = [Image.fromarray(np.full((8, 8, 3), 60 * n, np.uint8)) for n in range(count)]
    pictures[0].save(file, format, save_all=True, append_images=pictures[1:])
    return file.getvalue()


def test_frames_beyond_the_first_are_counted(tmp_path):
    files = {"a.gif": "GIF", "b.webp": "WEBP", "c.png": "PNG", "d.tif": "TIFF", "e.jpg": "MPO"}
    root = write_files(tmp_path, {name: frames(format) for name, format in files.items()})
    _, tally = judge(write_files(root, {f"{name[0]}.txt": "t" for name in files}))
    assert (tally.good, counts(tally.notes)) == (5, {FURTHER_FRAME: 12})


def test_what_img2dataset_writes(tmp_path):
    """Archives or folders, and beside each a table of its samples and its statistics."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = [
        (f"{n}.{s}", c) for n in range(3) for s, c in (("png", IMAGE), ("txt", b"t"), ("json", b'{"caption": "t"}'))
    ]
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    write_tar(packed / "00000.tar", members)
    write_files(plain / "00000", dict(members))
    for root in (packed, plain):
        pq.write_table(pa.table({"url": ["u"] * 3, "caption": ["t"] * 3}), root / "00000.parquet")
        write_files(root, {"00000_stats.json": "{}"})
        _, tally = judge(root)
        assert (tally.good, tally.bad_count) == (3, 0)
        assert any("00000.parquet" in named.names for named in tally.ignored.values())


def test_metadata_in_a_table_and_columns_that_name_nothing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = write_files(tmp_path / "a", {f"{n}.png": IMAGE for n in range(2)})
    pq.write_table(pa.table({"file_name": ["0.png", "1.png"], "text": ["zero", "one"]}), root / "metadata.parquet")
    assert judge(root)[0] == {"0.png": "zero", "1.png": "one"}
    root = write_files(tmp_path / "b", {"0.png": IMAGE, "metadata.jsonl": '{"path": "0.png", "text": "zero"}'})
    assert counts(judge(root)[1].bad) == {NO_NAME.format("file_name"): 1, "missing caption": 1}
    assert judge(root, Columns(image="path"))[0] == {"0.png": "zero"}
    root = write_files(tmp_path / "c", {"0.png": IMAGE, "metadata.csv": "file_name,text,text\n0.png,a,b\n"})
    with pytest.raises(ValueError, match="column text comes twice"):
        judge(root)


def test_forms_that_are_not_read_are_bad_unless_another_form_is_there(tmp_path):
    files = {"a.heic": b"\0\0\0\x18ftypheic", "a.txt": "t", "b.heic": b"x", "b.png": IMAGE, "b.txt": "t"}
    captions, tally = judge(write_files(tmp_path, files))
    assert captions == {"b.png": "t"}
    assert [named.names for named in (*tally.bad.values(), *tally.ignored.values())] == [["a.heic"], ["b.heic"]]


def test_shards_that_the_names_of_others_promise_are_named(tmp_path):
    members = [("0.png", IMAGE), ("0.txt", b"t")]
    for number in (0, 2):
        write_tar(tmp_path / f"train-{number:05}-of-00004.tar", members)
    _, tally = judge(tmp_path)
    assert tally.good == 2
    assert tally.ignored[ABSENT_SHARD].names == ["train-00001-of-00004.tar", "train-00003-of-00004.tar"]


def test_packed_prompts_are_read_whole_or_refused(tmp_path):
    data = gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n')
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(data)
    assert list(judge(path, opened=open_prompts)[0].values()) == ["one", "two"]
    for damaged in (data[:-9], data[:12], b"no gzip", data + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short or damaged"):
            judge(path, opened=open_prompts)
