"""Pairs in files: Pick-a-Pic's columns, bad rows, the split by prompt, order, verdicts, what is made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.data.formats.pairs import open_pairs
from flashdmd_ray.data.sample import Bad
from flashdmd_ray.reward_training.config import PairsConfig
from flashdmd_ray.reward_training.made_pairs import demo_pairs
from flashdmd_ray.reward_training.pairs import is_held_out, open_pair_data
from flashdmd_ray.reward_training.verdicts import judge, load_judges, verdicts
from tests.reward_training.conftest import picture, row, write_pairs

BAD_ROWS = {
    "missing caption": {"caption": None},
    "empty caption": {"caption": "  "},
    "missing image": {"jpg_1": None},
    "not an image": {"jpg_0": b"text"},
    "no label": {"label_0": 0.0, "label_1": 0.0},
}


def config_for(tmp_path, **settings) -> PairsConfig:
    return PairsConfig(cache=tmp_path / "cache", **settings)


def test_bad_rows_are_counted_named_and_never_used(tmp_path) -> None:
    rows = [row(number) for number in range(40)]
    for number, changes in enumerate(BAD_ROWS.values()):
        rows[7 * number] = row(7 * number) | changes
    path = str(write_pairs(tmp_path / "pairs.parquet", rows))
    with pytest.raises(
        ValueError, match=r"5 of 40 samples are bad \(12\.5%, allowed 1\.0%\).*raise pairs\.max_bad_fraction"
    ):
        open_pair_data(config_for(tmp_path), path, (16, 16), 0)
    data = open_pair_data(config_for(tmp_path, max_bad_fraction=0.2, held_out=0.3), path, (16, 16), 0)
    assert {reason: named.names for reason, named in data.tally.bad.items()} == {
        reason: [f"pairs.parquet group {7 * n // 8} row {7 * n % 8}"] for n, reason in enumerate(BAD_ROWS)
    }
    assert len(data.train) + len(data.held_out) == 35
    used = data.train.take(torch.arange(len(data.train))).texts
    assert not {f"scene {7 * number}" for number in range(5)} & set(used)


def test_pairs_come_with_their_labels_and_both_images_in_an_order_of_the_seed(tmp_path) -> None:
    rows = [row(number, label=(0.0, 0.5, 1.0)[number % 3]) for number in range(30)]
    source = str(write_pairs(tmp_path / "pairs.parquet", rows))
    data = open_pair_data(config_for(tmp_path, held_out=0.2), source, (16, 16), 3)
    pairs = data.train.take(torch.arange(len(data.train)))
    assert sorted(pairs.texts) == sorted(r["caption"] for r in rows if not is_held_out(r["caption"], 0.2))
    assert list(pairs.texts) != sorted(pairs.texts)
    for text, images, label in zip(pairs.texts, pairs.images, pairs.labels, strict=True):
        number = int(text.split()[1])
        assert label == (0.0, 0.5, 1.0)[number % 3]
        for which in (0, 1):
            pixels = np.random.default_rng(2 * number + which).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
            torch.testing.assert_close(images[which], expected)
    again = open_pair_data(config_for(tmp_path, held_out=0.2), source, (16, 16), 3)
    assert again.train.take(torch.arange(5)).texts == pairs.texts[:5]
    assert torch.equal(pairs.truth, pairs.labels)


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path) -> None:
    rows = [row(number) | {"caption": f"scene {number % 9}"} for number in range(45)]
    data = open_pair_data(config_for(tmp_path, held_out=0.4), str(write_pairs(tmp_path / "p.parquet", rows)), (8, 8), 0)
    sides = [set(part.take(torch.arange(len(part))).texts) for part in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 9


def test_a_picture_damaged_behind_its_header_is_replaced_and_named(tmp_path) -> None:
    rows = [row(number) for number in range(20)]
    rows[4]["jpg_0"] = picture(8)[:-40]
    data = open_pair_data(config_for(tmp_path, held_out=0.2), str(write_pairs(tmp_path / "p.parquet", rows)), (8, 8), 0)
    part = data.held_out if is_held_out("scene 4", 0.2) else data.train
    assert len(part.take(torch.arange(len(part))).texts) == len(part)
    assert part.met == [Bad("p.parquet group 0 row 4", "truncated or damaged image")]


def test_datasets_on_disk_are_the_same_pairs(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [row(number) for number in range(20)]
    rows[3]["label_0"] = None
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hub"))
    settings = {"held_out": 0.2, "max_bad_fraction": 0.1}
    found = open_pair_data(config_for(tmp_path, **settings), str(tmp_path / "hub"), (16, 16), 0)
    assert found.tally.bad["no label"].names == ["row 3"]
    written = write_pairs(tmp_path / "p.parquet", rows, group=32)
    same = open_pair_data(config_for(tmp_path, **settings), str(written), (16, 16), 0)
    positions = torch.arange(8)
    ours, theirs = found.train.take(positions), same.train.take(positions)
    assert ours.texts == theirs.texts
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)


def test_missing_columns_and_missing_files_are_one_line(tmp_path) -> None:
    rows = [{k: v for k, v in row(0).items() if k != "label_1"}]
    with pytest.raises(ValueError, match=r"no column label_1; labelled pairs have caption, jpg_0, jpg_1"):
        open_pairs(str(write_pairs(tmp_path / "p.parquet", rows)))
    with pytest.raises(ValueError, match=r"pairs\.source: nowhere is no \.parquet file"):
        open_pairs("nowhere")
    alone = str(write_pairs(tmp_path / "one.parquet", [row(0)]))
    with pytest.raises(ValueError, match=r"leaves no pair (held out|to train on); choose another share"):
        open_pair_data(config_for(tmp_path), alone, (8, 8), 0)


def test_verdicts_are_votes_by_weight_whatever_the_scale() -> None:
    first = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [5.0, 5.0], [1.0, float("nan")]])
    second = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.3, 0.2], [0.1, 0.1], [1.0, 2.0]]) * 1e-3
    label = verdicts({"a": first, "b": second}, {"a": 1.0, "b": 1.0})
    assert label[:4].tolist() == [0.5, 0.0, 1.0, 0.5]
    assert label[4].isnan()
    assert verdicts({"a": first, "b": second}, {"a": 2.0, "b": 1.0})[:2].tolist() == [1.0, 0.0]


def test_demo_pairs_are_equal_on_every_call_and_the_packaged_reward_agrees_with_their_labels() -> None:
    make = demo_pairs("held_out", 0)
    pairs = make(0, 128)
    assert torch.equal(pairs.images, make(0, 128).images)
    assert not torch.equal(pairs.images, make(128, 128).images)
    assert 0.3 < pairs.labels.mean() < 0.7, "the better image is on either side"
    judges = load_judges([RewardConfig(kind="pickscore")], torch.device("cpu"))
    rewards = judge(judges, pairs.images, pairs.texts)["pickscore"]
    assert ((rewards[:, 0] > rewards[:, 1]) == (pairs.labels > 0.5)).float().mean() > 0.9
