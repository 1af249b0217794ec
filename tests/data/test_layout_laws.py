"""Laws of all layouts: every picture is counted once, and no damage ends in a traceback or in silence."""

import csv
import io
import json
import tarfile

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scenes_on_disk import write_tar

from flashdmd_ray.data.formats import Columns
from tests.data.layouts import IMAGE, SYSTEM, counts, judge, tar_bytes, write_files

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

STEMS = st.sampled_from(["0", "1", "a.b", "a.c", "a", "sub/0", "x.y.z", "é"])
SUFFIXES = st.sampled_from(["png", "PNG", "heic", "jpg", "seg.png", "txt", "caption", "json", "cls", "JSON"])
NAMES = st.builds("{}.{}".format, STEMS, SUFFIXES) | st.sampled_from(SYSTEM)
IMAGES = (".png", ".jpg", ".heic")


@given(names=st.lists(NAMES, max_size=12, unique_by=str.lower), optional=st.booleans())
@quick
def test_every_image_is_counted_once_in_archives_and_folders(tmp_path_factory, names, optional):
    """Whatever files lie together, in an archive and in a folder: the same samples, and each image in one of three counts."""
    root = tmp_path_factory.mktemp("any")
    contents = {n: IMAGE if n.lower().endswith(IMAGES) else json.dumps({"text": n}) for n in names}
    archive = write_tar(root / "a.tar", [(n, c if isinstance(c, bytes) else c.encode()) for n, c in contents.items()])
    in_archive, tally = judge(archive, Columns(captionless=optional))
    images = sum(n.lower().endswith(IMAGES) for n in names)
    lone = counts(tally.bad).get("missing image", 0)
    others = sum(count for reason, count in counts(tally.ignored).items() if reason.startswith("neither"))
    system = sum(n in SYSTEM and not n.endswith(IMAGES) for n in names)
    assert tally.good + tally.bad_count - lone + sum(counts(tally.ignored).values()) - others - system == images
    texts = {caption for caption in in_archive.values() if caption}
    used = {
        json.loads(text)["text"].rpartition(".")[0] if text.startswith("{") else text.rpartition(".")[0]
        for text in texts
    }
    written = {
        n.rpartition(".")[0] for n in names if n.lower().endswith((".txt", ".caption", ".json")) and n not in SYSTEM
    }
    assert lone <= len(written - used), "a caption that is used is not left over"
    assert len(texts) == sum(bool(caption) for caption in in_archive.values()), "no caption is used twice"
    if any(n.lower().endswith(IMAGES) and n not in SYSTEM for n in names):
        in_folder, _ = judge(write_files(root / "f", contents), Columns(captionless=optional))
        assert sorted(in_folder.values()) == sorted(in_archive.values())


FIELDS = st.sampled_from([100, 124, 135, 136, 148, 156])  # of a header: mode, size, time, checksum, type
HEADERS = st.builds(lambda member, byte: 1024 * member + byte, st.integers(0, 7), FIELDS)
FLIPS = st.lists(st.tuples(st.integers(0, 8000) | HEADERS, st.sampled_from([0x55, 0xB0, 0xCF])), max_size=4)


@given(
    cut=st.integers(0, 8300) | st.just(10_240), junk=st.just(b"") | st.binary(max_size=700), flips=st.just([]) | FLIPS
)
@example(cut=10_240, junk=b"", flips=[(1024 + 124, 0xB0), (1024 + 156, 0x7C)])  # a long name of 88 bits
@quick
def test_a_damaged_archive_never_ends_in_a_traceback_or_in_silence(tmp_path_factory, cut, junk, flips):
    root = tmp_path_factory.mktemp("any")
    data = bytearray(tar_bytes(root, "a", 4))
    with tarfile.open(root / "one" / "part.tar") as archive:
        ends = [member.offset_data + member.size for member in archive][1::2]
    for position, change in flips:
        data[position] ^= change
    for start in range(0, 8 * 1024, 1024):  # else a wrong checksum hides what a header says
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 155] = b"%06o\0" % sum(data[start : start + 512])
    (root / "a.tar").write_bytes(bytes(data[:cut]) + junk)
    _, tally = judge(root / "a.tar")
    assert tally.good + tally.bad_count + sum(counts(tally.ignored).values()) > 0
    if not flips and not junk:
        assert tally.good == sum(end <= cut for end in ends)
        assert (tally.bad_count > 0) == (cut < -(-ends[-1] // 512) * 512 + 512), (
            "without the block of zeros at its end, something may be gone"
        )
    elif not flips and cut >= len(data):
        assert tally.good >= 4
        assert tally.samples > 4 or not junk.strip(b"\0"), "bytes after the end are named"


CELLS = st.text(st.sampled_from('ab ,;"\n\r\t\\ü\x00#'), max_size=8)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), max_size=6),
    raw=st.binary(max_size=60),
    kind=st.sampled_from(["csv", "jsonl"]),
)
@quick
def test_any_metadata_file_is_read_or_named(tmp_path_factory, rows, raw, kind):
    """A correct file is read back as written. When any bytes follow it, every image is still counted."""
    root = tmp_path_factory.mktemp("any")
    names = [f"{n}.png" for n in range(len(rows) + 1)]
    write_files(root, dict.fromkeys(names, IMAGE))
    text = io.StringIO(newline="")
    if kind == "csv":
        csv.writer(text).writerows([("file_name", "text"), *((f"{n}.png", row[0]) for n, row in enumerate(rows))])
    else:
        text.write("".join(json.dumps({"file_name": f"{n}.png", "text": row[0]}) + "\n" for n, row in enumerate(rows)))
    path = root / f"metadata.{kind}"
    path.write_bytes(text.getvalue().encode())
    captions, tally = judge(root)
    expected = {f"{n}.png": row[0].strip() for n, row in enumerate(rows) if row[0].strip() and "\0" not in row[0]}
    assert captions == expected
    assert tally.samples == len(names)
    path.write_bytes(path.read_bytes() + raw)
    lines = [line for line in io.TextIOWrapper(io.BytesIO(raw), "utf-8", "surrogateescape") if line.strip()]
    exact = kind == "jsonl" and bool(rows)
    try:
        found = judge(root)[1].samples - exact * len(lines)
    except ValueError as error:  # in one line, where the header or the caption's name cannot be told any more
        found = len(names) * (path.name in str(error) and "\n" not in str(error))
    assert found == len(names) if exact else found >= len(names)
