"""Text embeddings and latents computed before a run: the same numbers, and refused where they do not belong."""

import json

import pytest
import torch
from safetensors import safe_open
from scenes_on_disk import samples, write_folder, write_tars

from flashdmd_ray.config import load_config
from flashdmd_ray.data.build import build_images, open_reals
from flashdmd_ray.data.executor import in_threads
from flashdmd_ray.data.precompute import distinct_texts, precompute
from flashdmd_ray.data.precomputed import use_embeddings
from flashdmd_ray.roles.networks import load_family, load_parts

COUNT = 20


def settings(tmp_path, *more):
    return load_config(
        None,
        [
            *(f"data.source={tmp_path / 'data'}", f"data.cache={tmp_path / 'cache'}", "runtime=local"),
            *("adversarial.real_through_vae=true", "data.max_bad_fraction=0.2", *more),
        ],
    )


@pytest.fixture
def computed(tmp_path):
    data = samples(COUNT)
    data[7] = (data[7][0], data[7][1][: len(data[7][1]) // 2])
    write_tars(tmp_path / "data", data, each=6)
    config = settings(tmp_path)
    for what in ("embeddings", "latents"):
        precompute(what, config.data, config.model, tmp_path / "out", in_threads, load_parts)
    return tmp_path


def test_latents_are_those_of_the_run(computed):
    """Bit for bit what the role would have encoded, in the run's order, the damaged image replaced alike."""
    plain = settings(computed)
    family = load_family(plain.model)
    positions = torch.arange(COUNT)
    reals = build_images(plain.data, plain.seed).reals(positions, family.image_size)
    expected = torch.cat([family.encode_images(part) for part in reals.images.repeat_interleave(8, 0).split(8)])[
        ::8
    ]  # in groups of 8, as they were computed
    with_stored = settings(computed, f"data.latents={computed / 'out' / 'latents'}")
    found = open_reals(with_stored, family).latents(positions, family.image_size, _never)
    assert torch.equal(found.values, expected)
    assert found.captions == reals.captions
    assert found.replaced == reals.replaced == 1


def test_embeddings_are_those_of_the_run(computed):
    config = settings(computed, f"data.embeddings={computed / 'out' / 'embeddings'}")
    family, fresh = load_parts(config.model, ["text"]), load_parts(config.model, ["text"])
    texts = distinct_texts(config.data)
    assert texts[0] == ""
    assert len(texts) > COUNT // 2
    use_embeddings(family, config.data, config.model)
    family.text.encode_group = _never  # nothing is encoded any more
    for mine, theirs in zip(family.text(texts), fresh.text(texts), strict=True):
        assert torch.equal(mine, theirs)


def test_a_prompt_that_is_not_stored_is_encoded_as_usual(computed):
    config = settings(computed, f"data.embeddings={computed / 'out' / 'embeddings'}")
    family, fresh = load_parts(config.model, ["text"]), load_parts(config.model, ["text"])
    use_embeddings(family, config.data, config.model)
    texts = ["never seen before", distinct_texts(config.data)[3]]
    assert all(torch.equal(a, b) for a, b in zip(family.text(texts), fresh.text(texts), strict=True))


def _never(*arguments):
    raise AssertionError("what is stored was computed again")


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("latents", "revision", "revision is other and the run's"),
        ("latents", "resolution", r"resolution is other and the run's \[24, 24\]"),
        ("latents", "model", "model is other and the run's demo"),
        ("latents", "data", "data is other"),
        ("embeddings", "revision", "revision is other"),
        ("embeddings", "model", "model is other"),
    ],
)
def test_another_key_is_refused(computed, what, change, message):
    path = computed / "out" / what / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["key"][change] = "other"
    path.write_text(json.dumps(manifest))
    config = settings(computed, f"data.{what}={path.parent}")
    with pytest.raises(ValueError, match=f"data.{what}: .* was computed for something else .*{message}"):
        _open(config, what)


def _open(config, what):
    family = load_family(config.model)
    if what == "latents":
        return open_reals(config, family)
    return use_embeddings(load_parts(config.model, ["text"]), config.data, config.model)


def test_other_data_is_refused(computed):
    write_folder(computed / "others", samples(5, seed=3))
    config = settings(computed, f"data.source={computed / 'others'}", f"data.latents={computed / 'out' / 'latents'}")
    with pytest.raises(ValueError, match="computed for something else"):
        _open(config, "latents")


def test_an_unfinished_folder_is_refused_and_goes_on(computed):
    """Without its manifest it is no result; the same command keeps the shards that are whole and makes the others."""
    folder = computed / "out" / "latents"
    (folder / "manifest.json").unlink()
    config = settings(computed, f"data.latents={folder}")
    with pytest.raises(ValueError, match=r"has no manifest.json; precompute"):
        _open(config, "latents")
    (shard,) = folder.glob("*.safetensors")
    before = shard.stat().st_mtime_ns
    precompute("latents", config.data, config.model, computed / "out", in_threads, load_parts)
    assert shard.stat().st_mtime_ns == before
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="is missing or damaged"):
        _open(config, "latents")
    precompute("latents", config.data, config.model, computed / "out", in_threads, load_parts)
    assert shard.read_bytes() == content
    with safe_open(shard, framework="pt") as tensors:
        assert tensors.get_slice("latents").get_shape()[0] == COUNT


def test_a_manifest_cannot_name_files_elsewhere(computed):
    path = computed / "out" / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["file"] = "../../secret.safetensors"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        _open(settings(computed, f"data.latents={path.parent}"), "latents")
