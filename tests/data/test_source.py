"""Where a run reads its data: the same order in every process, restored exactly, whoever decodes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes_on_disk import samples, write_tars

from flashdmd_ray.config import DataConfig, load_config
from flashdmd_ray.data.build import build_images
from flashdmd_ray.data.executor import in_threads, ranges
from flashdmd_ray.data.index import open_index
from flashdmd_ray.data.prefetch import Decoded, ThreadDecoder, following, stride

SIZE = (16, 16)
BATCH = 5


def fresh(path, cache, **settings):
    """As another process would build it."""
    build_images.cache_clear()
    return build_images(DataConfig(source=str(path), cache=cache, **settings), 11)


def batch(source, step):
    reals = source.reals(step * BATCH + torch.arange(BATCH), SIZE)
    prompts = source.prompts("predict", step * BATCH + torch.arange(BATCH))
    return reals.images.numpy().tobytes(), reals.captions, prompts


@pytest.mark.parametrize("format", ["folder", "tar", "parquet"])
def test_stopped_in_the_middle_of_an_epoch_and_restored(written, cache, format):
    """24 samples, batches of 5: the sixth batch crosses into the second epoch. Nothing but the step is remembered."""
    straight = fresh(written[format], cache)
    whole = [batch(straight, step) for step in range(8)]
    for start in (2, 4, 5):
        resumed = fresh(written[format], cache)
        assert [batch(resumed, step) for step in range(start, 8)] == whole[start:]
    assert len({item for step in whole for item in step[1]}) > 15


SCRIPT = """
import hashlib, json, sys, torch
from pathlib import Path
from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.build import build_images
source = build_images(DataConfig(source=sys.argv[1], cache=Path(sys.argv[2])), 11)
rank = int(sys.argv[3])
found = []
for step in range(6):
    reals = source.reals(step * 4 + rank * 2 + torch.arange(2), (16, 16))
    found.append([hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in reals.images] + list(reals.captions))
print(json.dumps(found))
"""


def test_two_processes_share_one_order(written, cache):
    """Two ranks, each in a process of its own and indexing at the same time, together read what one process reads."""
    import hashlib

    command = [sys.executable, "-c", SCRIPT, str(written["tar"]), str(cache)]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    alone = fresh(written["tar"], cache)
    for step in range(6):
        reals = alone.reals(step * 4 + torch.arange(4), SIZE)
        digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in reals.images]
        assert outputs[0][step] == digests[:2] + list(reals.captions[:2])
        assert outputs[1][step] == digests[2:] + list(reals.captions[2:])


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_gives_the_same_images_in_the_same_order(written, cache):
    """Streamed through Ray Data and decoded in this process: equal, also after a jump, and at another size."""
    from flashdmd_ray.runtime.data_stream import RayDecoder

    config = DataConfig(source=str(written["tar"]), cache=cache)
    here, there = fresh(written["tar"], cache), fresh(written["tar"], cache)
    decoder = RayDecoder(config, there.images)
    there.decoder = decoder
    try:
        for step in [0, 1, 2, 3, 7, 8, 9]:
            assert batch(here, step) == batch(there, step)
        assert decoder._expected  # the stream was used, and has more
        assert here.reals(torch.arange(3), (8, 12)).images.equal(there.reals(torch.arange(3), (8, 12)).images)
    finally:
        decoder.close()


@pytest.mark.usefixtures("ray_cluster")
def test_an_index_made_on_ray_is_the_same_file(written, tmp_path):
    from flashdmd_ray.data.datasets import open_indexed
    from flashdmd_ray.data.formats import Columns, open_images
    from flashdmd_ray.runtime.data_stream import on_ray

    format = open_images(str(written["tar"]), Columns())
    one, two = (
        open_indexed(DataConfig(source=str(written["tar"]), cache=tmp_path / name), format, executor)
        for name, executor in (("here", in_threads), ("there", on_ray))
    )
    assert one.content == two.content
    assert one.table.equals(two.table)
    assert one.tally == two.tally


def test_an_index_is_made_once_and_again_when_a_file_changes(tmp_path, cache):
    from flashdmd_ray.data.formats import Columns, open_images

    write_tars(tmp_path / "t", samples(6), each=3)
    format = open_images(str(tmp_path / "t"), Columns())
    calls = []

    def scan(f):
        from flashdmd_ray.data.index import scan_here

        calls.append(f)
        return scan_here(f)

    first, again = open_index(format, cache, scan), open_index(format, cache, scan)
    assert len(calls) == 1
    assert first.content == again.content
    write_tars(tmp_path / "t", samples(6, seed=9), each=3)
    changed = open_index(format, cache, scan)
    assert len(calls) == 2
    assert changed.content != first.content
    assert not list(cache.glob(".unfinished*"))


def test_a_damaged_index_says_which_file_to_remove(written, cache):
    source = fresh(written["folder"], cache)
    assert len(source) == 24
    (path,) = cache.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.arrow is damaged .*remove it"):
        fresh(written["folder"], cache)


def test_a_cache_that_cannot_be_written(written, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.cache: cannot write"):
        fresh(written["folder"], tmp_path / "file" / "below")


class Slow:
    """Notes what it is asked for; an image is its sample number."""

    def __init__(self):
        self.asked = []

    def numbers(self, positions):
        return list(positions)

    def find(self, number, size):
        self.asked.append(number)
        return Decoded(np.full((*size, 3), number % 256, np.uint8), number)


@given(
    jumps=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    threads=st.integers(1, 3),
    batches=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_decoding_ahead_never_changes_what_is_decoded(jumps, threads, batches):
    """Any walk of batches, with breaks of any kind: each answer is that of its own positions."""
    images = Slow()
    decoder = ThreadDecoder(images, threads, batches)
    for start, size, steps in jumps:
        for step in range(steps):
            positions = range(start + step * size, start + (step + 1) * size)
            found = decoder.take(positions, (2, 2))
            assert [one.sample for one in found] == list(positions)
            assert [int(one.pixels[0, 0, 0]) for one in found] == [p % 256 for p in positions]


def test_the_next_batches_are_decoded_before_they_are_asked_for():
    images = Slow()
    decoder = ThreadDecoder(images, threads=1, batches=2)
    for step in range(3):
        decoder.take(range(step * 4, step * 4 + 2), (2, 2))
    decoder._pool.shutdown(wait=True)
    assert sorted(images.asked) == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]  # each once, two batches ahead


def test_strides():
    assert stride((0, 1), (4, 5)) == 4
    assert stride((), (4, 5)) is None
    assert stride((4, 5), (4, 5)) is None
    assert stride((0, 1), (4, 6)) is None
    assert following((0, 1), (4, 5), 2) == [8, 9, 12, 13]


@given(count=st.integers(0, 500), size=st.integers(1, 70))
@settings(deadline=None)
def test_ranges_cover_all(count, size):
    assert [i for start, stop in ranges(count, size) for i in range(start, stop)] == list(range(count))


def test_work_in_threads_keeps_the_order_and_passes_errors_on():
    assert list(in_threads(lambda: lambda x: x * x, range(50), 3)) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda: lambda x: 1 // (x - 7), range(50), 3))


def test_the_demo_source_reads_every_scene_once_per_epoch():
    source = build_images(DataConfig(scenes=40), 3)
    epoch = source.reals(torch.arange(40), (24, 24))
    again = source.reals(torch.arange(40, 80), (24, 24))
    assert sorted(epoch.captions) == sorted(again.captions)
    assert epoch.captions != again.captions
    assert source.reals(torch.arange(4), (48, 32)).images.shape == (4, 3, 48, 32)


def test_keys_that_do_not_go_together():
    for wrong, message in (
        (["data.decode=ray", "runtime=local"], "data.decode"),
        (["data.source=x", "data.latents=y"], "data.latents"),
        (["adversarial.real_through_vae=true", "data.latents=y"], "latents: the demo source"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, wrong)


def test_a_run_on_an_image_folder(tmp_path):
    """Two steps of joint training with the demo teacher on 30 real files, one of them damaged."""
    from scenes_on_disk import write_folder

    from flashdmd_ray.training import job

    data = samples(30)
    data[4] = (data[4][0], data[4][1][: len(data[4][1]) // 2])
    root = write_folder(tmp_path / "images", data)

    def run(name, steps):
        arguments = [
            *(f"steps={steps}", "batch=4", "ttur=2", "runtime=local", f"run.dir={tmp_path}", f"run.name={name}"),
            *(f"data.source={root}", f"data.cache={tmp_path / 'cache'}", "adversarial.prompt_projection=true"),
            *("preference.updates=1", "preference.batch=2", "preference.candidates=2", "tracking.enabled=false"),
            *("evaluation.samples=4", "evaluation.teacher_steps=1", "evaluation.student_steps=[4]"),
        ]
        assert job.run_job(load_config(None, arguments)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    straight = run("straight", 2)
    assert [record["step"] for record in straight] == [1, 2]
    assert straight[0]["data/source_samples"] == 30
    assert straight[0]["data/source_bad"] == 0
    assert 0 <= max(record["data/replaced"] for record in straight) <= 0.25
    report = json.loads((tmp_path / "straight" / "data_report.json").read_text())
    assert report["source"]["kind"] == "image folder"
    met = report.get("replaced", {"truncated or damaged image": {"names": []}})["truncated or damaged image"]["names"]
    assert met == (["004.png"] if any(record["data/replaced"] for record in straight) else [])
    assert Path(tmp_path / "straight" / "report.json").is_file()
