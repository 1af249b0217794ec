"""Which version of a model is served: copies, changes, refusals, and what is left when the source is gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdmd_ray.serving.loaded_models import LoadedModels
from flashdmd_ray.serving.model_sources import ExportFolder, open_source
from flashdmd_ray.serving.settings import parse_settings
from flashdmd_ray.serving.version_cache import RETAINED, VersionCache, fingerprint
from flashdmd_ray.serving.warm_up import WarmUp
from tests.serving.exports import TIMESTEPS, export_demo

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TIMEOUT_S = 60


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


def models_of(live, tmp_path, **settings):
    tree = {"models": {"demo": str(live)}, "cache": str(tmp_path / "cache"), "watch_s": None, "teachers": False}
    return LoadedModels(parse_settings(tree | settings), WarmUp(max_batch=1))


def test_a_version_is_copied_once_and_named_by_its_content(tmp_path):
    source = ExportFolder(small_export(tmp_path / "live", "{}"))
    cache = VersionCache(tmp_path / "cache", "demo", "live")
    first = cache.fetch(source, TIMEOUT_S)
    assert first.folder != tmp_path / "live"
    assert first.version == fingerprint(tmp_path / "live")
    assert cache.fetch(source, TIMEOUT_S) == first
    small_export(tmp_path / "live", '{"a": 1}')
    assert cache.fetch(source, TIMEOUT_S).version != first.version
    small_export(tmp_path / "live", "{}")
    assert cache.fetch(source, TIMEOUT_S).folder == first.folder


def test_what_changes_while_it_is_copied_is_not_served(tmp_path):
    class Restless(ExportFolder):
        def fetch(self, into, timeout_s):
            super().fetch(into, timeout_s)
            small_export(tmp_path / "live", "{} ")

    cache = VersionCache(tmp_path / "cache", "demo", "live")
    with pytest.raises(ValueError, match="changed while it was copied"):
        cache.fetch(Restless(small_export(tmp_path / "live", "{}")), TIMEOUT_S)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_old_versions_are_forgotten_and_the_last_good_one_is_known(tmp_path):
    cache = VersionCache(tmp_path / "cache", "demo", "live")
    assert cache.last_served() is None
    for number in range(RETAINED + 2):
        fetched = cache.fetch(ExportFolder(small_export(tmp_path / "live", f'{{"a": {number}}}')), TIMEOUT_S)
        cache.mark_served(fetched, TIMEOUT_S)
        assert cache.last_served() == fetched
    assert len([path for path in fetched.folder.parent.iterdir() if path.is_dir()]) == RETAINED
    broken = cache.fetch(ExportFolder(small_export(tmp_path / "live", "{}")), TIMEOUT_S)
    assert cache.last_served() == fetched != broken


def test_a_replica_that_starts_beside_a_broken_source_serves_the_last_good_version(live, tmp_path):
    first = models_of(live, tmp_path)
    first.load_all()
    (version, _), facts = first.find("demo"), json.loads((live / "flashdmd.json").read_text())
    assert facts["timesteps"] == list(TIMESTEPS)
    (live / "flashdmd.json").write_text("{")
    second = models_of(live, tmp_path)
    second.load_all()
    assert second.find("demo")[0].version == version.version
    assert "flashdmd.json is damaged" in second.infos()[0].refused
    with pytest.raises(ValueError, match=r"model demo: .*flashdmd.json is damaged"):
        models_of(live, tmp_path, cache=str(tmp_path / "another")).load_all()


def test_a_refusal_names_the_source_and_not_its_copy(live, tmp_path):
    weights = live / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model demo: cannot load unet") as refused:
        models_of(live, tmp_path).load_all()
    assert str(weights) in str(refused.value)
    assert "cache" not in str(refused.value)


def test_weights_that_are_no_numbers_are_refused(live, tmp_path):
    models = models_of(live, tmp_path)
    models.load_all()
    before = models.find("demo")[0].version
    weights = load_file(live / WEIGHTS)
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, live / WEIGHTS)
    models.refresh("demo")
    assert "not finite" in models.infos()[0].refused
    assert models.find("demo")[0].version == before
    save_file(weights, live / WEIGHTS)
    models.refresh("demo")
    assert models.infos()[0].refused is None


def test_a_broken_cache_is_named_and_the_old_version_stays(live, tmp_path):
    models = models_of(live, tmp_path)
    models.load_all()
    before = models.find("demo")[0].version
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("no folder")
    (live / "README.md").write_text("a new version")
    models.refresh("demo")
    assert "Not a directory" in models.infos()[0].refused
    assert models.find("demo")[0].version == before


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
