"""Which version of a model is served: copies, changes, refusals, and what is left when the source is gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdmd_ray.serving.rehearsal import Rehearsal
from flashdmd_ray.serving.settings import parse_settings
from flashdmd_ray.serving.shelf import Shelf
from flashdmd_ray.serving.snapshots import KEPT, SnapshotStore, fingerprint
from flashdmd_ray.serving.sources import ExportFolder, open_source
from tests.serving.exports import TIMESTEPS, export_demo

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PATIENCE_S = 60


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("versions") / "export")


def small_export(folder, text):
    """Enough of an export for what does not load it."""
    folder.mkdir(exist_ok=True)
    (folder / "flashdmd.json").write_text(text)
    return folder


@pytest.fixture
def live(export, tmp_path):
    return shutil.copytree(export, tmp_path / "live")


def shelf_of(live, tmp_path, **settings):
    tree = {"models": {"demo": str(live)}, "cache": str(tmp_path / "cache"), "watch_s": None, "teachers": False}
    return Shelf(parse_settings(tree | settings), Rehearsal(most=1))


def test_a_version_is_copied_once_and_named_by_its_content(tmp_path):
    source = ExportFolder(small_export(tmp_path / "live", "{}"))
    store = SnapshotStore(tmp_path / "cache", "demo", "live")
    first = store.take(source, PATIENCE_S)
    assert first.folder != tmp_path / "live"
    assert first.version == fingerprint(tmp_path / "live")
    assert store.take(source, PATIENCE_S) == first
    small_export(tmp_path / "live", '{"a": 1}')
    assert store.take(source, PATIENCE_S).version != first.version
    small_export(tmp_path / "live", "{}")
    assert store.take(source, PATIENCE_S).folder == first.folder


def test_what_changes_while_it_is_copied_is_not_served(tmp_path):
    class Restless(ExportFolder):
        def fetch(self, into, patience_s):
            super().fetch(into, patience_s)
            small_export(tmp_path / "live", "{} ")

    store = SnapshotStore(tmp_path / "cache", "demo", "live")
    with pytest.raises(ValueError, match="changed while it was copied"):
        store.take(Restless(small_export(tmp_path / "live", "{}")), PATIENCE_S)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_old_versions_are_forgotten_and_the_last_good_one_is_known(tmp_path):
    store = SnapshotStore(tmp_path / "cache", "demo", "live")
    assert store.last_good() is None
    for number in range(KEPT + 2):
        taken = store.take(ExportFolder(small_export(tmp_path / "live", f'{{"a": {number}}}')), PATIENCE_S)
        store.mark_good(taken, PATIENCE_S)
        assert store.last_good() == taken
    assert len([path for path in taken.folder.parent.iterdir() if path.is_dir()]) == KEPT
    broken = store.take(ExportFolder(small_export(tmp_path / "live", "{}")), PATIENCE_S)
    assert store.last_good() == taken != broken


def test_a_replica_that_starts_beside_a_broken_source_serves_the_last_good_version(live, tmp_path):
    first = shelf_of(live, tmp_path)
    first.fill()
    (version, _), facts = first.find("demo"), json.loads((live / "flashdmd.json").read_text())
    assert facts["timesteps"] == list(TIMESTEPS)
    (live / "flashdmd.json").write_text("{")
    second = shelf_of(live, tmp_path)
    second.fill()
    assert second.find("demo")[0].version == version.version
    assert "flashdmd.json is damaged" in second.infos()[0].refused
    with pytest.raises(ValueError, match=r"model demo: .*flashdmd.json is damaged"):
        shelf_of(live, tmp_path, cache=str(tmp_path / "another")).fill()


def test_a_refusal_names_the_source_and_not_its_copy(live, tmp_path):
    weights = live / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model demo: cannot load unet") as refused:
        shelf_of(live, tmp_path).fill()
    assert str(weights) in str(refused.value)
    assert "cache" not in str(refused.value)


def test_weights_that_are_no_numbers_are_refused(live, tmp_path):
    shelf = shelf_of(live, tmp_path)
    shelf.fill()
    before = shelf.find("demo")[0].version
    weights = load_file(live / WEIGHTS)
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, live / WEIGHTS)
    shelf.refresh("demo")
    assert "not finite" in shelf.infos()[0].refused
    assert shelf.find("demo")[0].version == before
    save_file(weights, live / WEIGHTS)
    shelf.refresh("demo")
    assert shelf.infos()[0].refused is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "neither an export"),
        ("models:/name", "write models:/name@alias or models:/name/version"),
        ("models:/../x@y", "write models:/"),
    ],
)
def test_sources_that_are_none(source, said):
    with pytest.raises(ValueError, match=said):
        open_source(source)
