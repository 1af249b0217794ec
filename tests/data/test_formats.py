"""Every format gives the same samples, and what is wrong with a source is said in one line."""

import json
import pickle
import socket

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from scenes_on_disk import as_pixels, encoded, pictures, samples, write_folder, write_hub, write_tar

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.build import build_images, open_image_reader
from flashdmd_ray.data.formats import Columns, hub, open_images, open_prompts
from flashdmd_ray.data.index import open_index, scan_piece

SIZE = (24, 24)


def source(path, cache, **settings):
    return build_images(DataConfig(source=str(path), cache=cache, **settings), 7)


@pytest.mark.parametrize("format", ["folder", "tar", "parquet"])
def test_a_format_holds_what_was_written(written, captioned, cache, format):
    """One epoch of real images is the data set, pixel for pixel, each beside its own caption."""
    data = source(written[format], cache)
    assert len(data) == len(captioned)
    reals = data.reals(torch.arange(len(captioned)), SIZE)
    found = {(caption, image.numpy().tobytes()) for caption, image in zip(reals.captions, reals.images, strict=True)}
    expected = set()
    for caption, image in pictures(len(captioned)):
        pixels = torch.from_numpy(as_pixels(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        expected.add((caption, pixels.numpy().tobytes()))
    assert found == expected
    assert reals.replaced == 0
    assert sorted(data.prompts("predict", torch.arange(24))) == sorted(caption for caption, _ in captioned)


def test_a_hugging_face_dataset(captioned, cache, tmp_path):
    pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    folder = write_hub(tmp_path / "saved", captioned)
    data = source(folder, cache)
    images = open_image_reader(DataConfig(source=str(folder), cache=cache), 7)
    assert images.index.captions(range(24)) == tuple(caption for caption, _ in captioned)
    assert images.format.read(images.index.sample(3)) == captioned[3][1]
    assert data.reals(torch.arange(24), SIZE).images.shape == (24, 3, 24, 24)
    assert pickle.loads(pickle.dumps(images.format)).read(images.index.sample(5)) == captioned[5][1]


def test_a_hugging_face_dataset_cannot_point_elsewhere(captioned, cache, tmp_path):
    """A table may hold a path instead of an image. One to a file of this machine is not followed."""
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    from scenes_on_disk import write_folder

    outside = write_folder(tmp_path / "private", captioned[:1]) / "000.png"
    columns = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = [
        {"bytes": captioned[0][1], "path": None},
        {"bytes": None, "path": str(outside)},
        {"bytes": None, "path": None},
    ]
    features = datasets.Features({"image": columns, "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": rows, "text": ["a", "b", "c"]}, features).save_to_disk(tmp_path / "saved")
    index = open_index(open_images(str(tmp_path / "saved"), Columns()), cache)
    assert index.captions(range(len(index))) == ("a",)
    assert {reason: named.names for reason, named in index.tally.bad.items()} == {
        "leaves the data folder": ["row 1"],
        "missing image": ["row 2"],
    }


def test_without_the_library_a_hub_source_names_the_extra(monkeypatch, cache):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs the library 'datasets'.*flashdmd-ray\[hub\]"):
        source("hf:someone/images:train", cache)


def test_a_hub_name_that_cannot_be_had(cache):
    pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    with pytest.raises(ValueError, match=r"hf:someone/images-that-are-not-there cannot be loaded"):
        source("hf:someone/images-that-are-not-there", cache)


def test_a_hub_that_does_not_answer_is_named_without_the_libraries_tries(cache, monkeypatch):
    config = pytest.importorskip("datasets", reason="the extra 'hub' is not installed").config
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HUB_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"hf:someone/images cannot be loaded .*the hub cannot be reached"):
            source("hf:someone/images", cache)
    assert constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("format", ["folder", "tar", "parquet"])
def test_pieces_are_scanned_alike_in_another_process(written, format):
    """A format is pickled to workers: paths and settings only, and the same samples come back."""
    here = open_images(str(written[format]), Columns())
    list(here.scan(0))
    there = pickle.loads(pickle.dumps(here))
    for piece in range(here.pieces()):
        assert scan_piece(here, piece) == scan_piece(there, piece)


def test_a_webdataset_with_captions_in_json(tmp_path, cache):
    (caption, image), (other, second) = samples(2)
    path = write_tar(
        tmp_path / "one.tar",
        [
            ("a/x.jpg", encoded(Image.open(__import__("io").BytesIO(image)), "JPEG")),
            ("a/x.json", json.dumps({"caption": caption, "long": other}).encode()),
            ("a/x.npy", b"ignored"),
            ("./b/y.seg.png", second),
            ("./b/y.json", json.dumps({"caption": other, "long": caption}).encode()),
        ],
    )
    index = open_index(open_images(str(path), Columns()), cache)
    assert index.captions(range(2)) == (caption, other)
    assert index.sample(1).key == "one.tar:b/y"
    chosen = open_index(open_images(str(path), Columns(caption="long")), cache)
    assert chosen.captions(range(2)) == (other, caption)


def test_unicode_and_spaces_in_names_and_captions(tmp_path, cache):
    image = samples(1)[0][1]
    names = ["mit Leerzeichen.png", "größe.png", "数字.png", "ein Ordner/🙂.png"]
    root = write_folder(tmp_path / "bilder 数", [], [{"file_name": n, "text": f"ein Bild: {n}"} for n in names])
    (root / "ein Ordner").mkdir()
    for name in names:
        (root / name).write_bytes(image)
    members = [m for n in names for m in ((n, image), (n.replace("png", "txt"), f"ein Bild: {n}".encode()))]
    tar = write_tar(tmp_path / "数 字.tar", members)
    for path in (root, tar):
        data = source(path, cache)
        assert sorted(data.reals(torch.arange(4), SIZE).captions) == sorted(f"ein Bild: {n}" for n in names)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_prompts_from_files(tmp_path, cache, written, kind):
    texts = ["a red 4", "zwei größere Ziffern", "  spaces around  ", "数字の 7"]
    path = tmp_path / f"prompts.{kind}"
    if kind == "txt":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["a red 4", *texts[1:2], "", *texts[2:]]).encode())
    elif kind == "jsonl":
        path.write_text("\n".join([json.dumps({"prompt": t}) for t in texts[:3]] + [json.dumps(texts[3])]))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": texts}), path)
    expected = sorted(text.strip() for text in texts)
    for source_path in (str(written["tar"]), "demo"):
        data = build_images(DataConfig(source=source_path, prompts=str(path), cache=cache, scenes=50), 1)
        assert sorted(data.prompts("predict", torch.arange(4))) == expected
        assert sorted(data.prompts("predict", torch.arange(4, 8))) == expected
        assert data.reals(torch.arange(2), SIZE).captions[0] not in expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "does not exist"),
        (lambda p: _touched(p / "data.tar.gz"), "is compressed.*unpack it"),
        (lambda p: _touched(p / "shards" / "0.tgz").parent, "is compressed"),
        (lambda p: _touched(p / "list.txt"), "belong in data.prompts"),
        (lambda p: _touched(p / "list.json"), "from their folder, under the name metadata.jsonl or metadata.csv"),
        (
            lambda p: _touched(p / "images" / "a.jpg").parent,
            r'no usable sample in this image folder: missing caption: 1 \(a.jpg.*"file_name": "a.png", "text": "..."} of metadata.jsonl',
        ),
        (lambda p: _touched(p / "notes" / "a.md").parent, r"holds no image, no .tar and no .parquet"),
        (
            lambda p: _touched(_touched(p / "two" / "a.tar").parent / "b.parquet").parent,
            "1 .tar files, 1 .parquet files; name a",
        ),
        (lambda p: _touched(p / "broken.parquet", b"PAR1 no"), "not a whole parquet file"),
    ],
)
def test_an_unusable_source_is_one_line(tmp_path, cache, make, message):
    with pytest.raises(ValueError, match=message) as error:
        source(make(tmp_path), cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("p.csv", "is no .txt"), ("missing.txt", "no such file")])
def test_unusable_prompts_are_one_line(tmp_path, name, message):
    _touched(tmp_path / "p.csv")
    with pytest.raises(ValueError, match=message):
        open_prompts(str(tmp_path / name), Columns())


def test_a_column_that_is_not_there_names_those_that_are(written, cache):
    with pytest.raises(ValueError, match=r"no column 'title'; it has image, text; set data.caption"):
        source(written["parquet"], cache, caption="title")
    with pytest.raises(ValueError, match=r"no column 'photo'; it has image, text; set data.image"):
        source(written["parquet"], cache, image="photo")


def test_other_columns_can_be_named(tmp_path, cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = samples(3)
    table = pa.table({"title": [c for c, _ in data], "photo": [i for _, i in data], "text": ["no"] * 3})
    pq.write_table(table, tmp_path / "t.parquet")
    found = source(tmp_path / "t.parquet", cache, caption="title", image="photo")
    assert sorted(found.reals(torch.arange(3), SIZE).captions) == sorted(caption for caption, _ in data)


def _touched(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_mixing_reads_few_row_groups(written, cache, monkeypatch):
    """Parquet of 6 row groups, two mixed at a time: an epoch reads every row group once, not once per image."""
    images = open_image_reader(DataConfig(source=str(written["parquet"]), cache=cache, shuffle_blocks=2), 7)
    assert len(images.index.block_sizes) == 6
    reads = []
    load = type(images.format)._load
    monkeypatch.setattr(type(images.format), "_load", lambda self, block: (reads.append(block), load(self, block))[1])
    for number in images.numbers(range(24)):
        images.find(number, SIZE)
    assert sorted(reads) == list(range(6))
    assert isinstance(images.find(0, SIZE).pixels, np.ndarray)
