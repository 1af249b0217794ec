"""Folders and archives of pictures for the tests of layouts, and what became of each picture."""

import io

import numpy as np
from PIL import Image
from scenes_on_disk import write_tar

from flashdmd_ray.data.formats import Columns, open_images
from flashdmd_ray.data.index import scan_here
from flashdmd_ray.data.tally import Tally


def picture(shade=0, **options):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade % 256, np.uint8)).save(file, "PNG", **options)
    return file.getvalue()


IMAGE = picture()


def judge(path, columns=None, opened=open_images):
    """({key: caption}, tally) of a data set."""
    captions, tally = {}, Tally()
    for samples, counts in scan_here(opened(str(path), columns or Columns())):
        tally.merge(counts)
        captions |= {sample.key: sample.caption for sample in samples}
    assert tally.good == len(captions), "keys are unique"
    return captions, tally


def counts(kind):
    return {reason: named.count for reason, named in kind.items()}


def folder(root, **files):
    return write_files(root, {name.replace("__", "."): content for name, content in files.items()})


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


SYSTEM = [
    ".DS_Store",
    "._0.png",
    "sub/._0.txt",
    "__MACOSX/0.png",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/0.png",
]


def tar_bytes(tmp_path, prefix, count):
    return write_tar(
        tmp_path / "one" / "part.tar",
        [(f"{prefix}{n}.{s}", c) for n in range(count) for s, c in (("png", IMAGE), ("txt", b"t"))],
    ).read_bytes()
