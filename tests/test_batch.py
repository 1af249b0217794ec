"""Laws of the batch dataclasses and of the draws: nothing a sample sees may depend on how many ranks share the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdmd_ray.batch import (
    Candidates,
    Fakes,
    Latents,
    PreferencePairs,
    Prompts,
    StepRng,
    StoredRows,
    choose,
    concat_values,
    derive_seed,
    from_uint8,
    noise,
    split_value,
    to_uint8,
)


def prompts(count):
    return Prompts(tuple(f"scene {i}" for i in range(count)), 100 + torch.arange(count))


def numbered(count, *shape):
    """(count, *shape) filled with each row's own number."""
    return torch.arange(float(count)).reshape(-1, *[1] * len(shape)).expand(count, *shape).contiguous()


def batches(count):
    latents = Latents(numbered(count, 4, 2, 2), prompts(count))
    group = numbered(count, 3, 4, 2, 2)
    pair = numbered(count, 4, 2, 2)
    return {
        "prompts": prompts(count),
        "prediction": Fakes(latents, latents),
        "candidates": Candidates(prompts(count), pair, group, group[:, :0], 999, 749, 7),
        "pairs": PreferencePairs(
            prompts(count),
            pair,
            pair,
            pair,
            numbered(count),
            numbered(count),
            timestep=999,
            next_timestep=749,
            version=7,
        ),
    }


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and all(
            equal(getattr(one, f), getattr(other, f)) for f in one.__dataclass_fields__
        )
    return one == other


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(batches(1))), count=st.integers(1, 17), data=st.data())
def test_shards_are_even_and_join_to_the_batch(kind, count, data):
    parts = data.draw(st.integers(1, count))
    batch = batches(count)[kind]
    shards = batch.split(parts)
    sizes = [len(shard) for shard in shards]
    assert len(shards) == parts
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert equal(type(batch).concat(shards), batch)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 17), data=st.data())
def test_texts_stay_with_their_tensors(count, data):
    parts = data.draw(st.integers(1, count))
    for shard in batches(count)["candidates"].split(parts):
        assert len(shard.prompts) == len(shard.noisy) == len(shard.values) == len(shard.images)
        for text, index, row in zip(shard.prompts.texts, shard.prompts.indices, shard.noisy, strict=True):
            assert text == f"scene {int(row.mean())}"
            assert index == 100 + row.mean()
        assert (shard.timestep, shard.next_timestep, shard.version) == (999, 749, 7)


def test_pixels_come_back_and_round_to_the_nearest():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert (from_uint8(to_uint8(torch.linspace(-1, 1, 999))) - torch.linspace(-1, 1, 999)).abs().max() <= 1 / 255 + 1e-6


def test_a_rank_without_work_is_refused():
    with pytest.raises(ValueError, match="batch of 2 over 3 ranks: use a larger batch or fewer ranks"):
        prompts(2).split(3)


def test_columns_of_different_sizes_are_refused():
    with pytest.raises(AssertionError, match="columns of different sizes"):
        Prompts(("a", "b", "c"), torch.arange(2)).split(2)


def test_loose_values_are_cut_like_batches():
    timesteps, texts = torch.arange(5), ("a", "b", "c", "d", "e")
    assert [t.tolist() for t in split_value(timesteps, 2)] == [[0, 1, 2], [3, 4]]
    assert split_value(texts, 2) == [("a", "b", "c"), ("d", "e")]
    assert split_value(texts, 1) == [texts]
    assert split_value(0.98, 3) == [0.98] * 3
    assert split_value((999, 749), 2) == [(999, 749)] * 2  # a setting, not a column
    assert torch.equal(concat_values(split_value(timesteps, 2)), timesteps)
    assert concat_values(split_value(texts, 2)) == texts
    assert concat_values([torch.tensor(1.0), torch.tensor(3.0)]) == 2


def test_ranks_must_agree_about_common_values():
    one, other = batches(4)["pairs"].split(2)
    with pytest.raises(AssertionError, match="ranks disagree"):
        PreferencePairs.concat([one, PreferencePairs(**{**vars(other), "version": 8})])


@settings(max_examples=30, deadline=None)
@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=9), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_noise_does_not_depend_on_the_shard(indices, seed, data):
    parts = data.draw(st.integers(1, len(indices)))
    rows = torch.tensor(indices)
    whole = noise(rows, (4, 3, 3), seed, "start")
    assert whole.dtype == torch.float32
    assert torch.equal(
        torch.cat([noise(part, (4, 3, 3), seed, "start") for part in torch.tensor_split(rows, parts)]), whole
    )


def test_noise_is_standard_normal_and_its_streams_are_independent():
    indices = torch.arange(400)
    draws = torch.stack(
        [
            noise(indices, (64,), 0, "start").flatten(),
            noise(indices, (64,), 0, "hop").flatten(),
            noise(indices, (64,), 1, "start").flatten(),
            noise(indices + 1, (64,), 0, "start").flatten(),
        ]
    )
    limit = 4 / draws.shape[1] ** 0.5
    assert draws.mean(dim=1).abs().max() < limit
    assert (draws.var(dim=1) - 1).abs().max() < 1.5 * limit
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < limit


def test_drawing_leaves_the_ambient_generator_alone():
    before = torch.random.get_rng_state()
    noise(torch.arange(3), (2,), 0, "start")
    StepRng(0, 1).timesteps("matching", 3, 0, 1000)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_are_the_same_everywhere():
    """Recorded values: a change would make every recorded run irreproducible."""
    assert derive_seed(0, "start", 0) == 2154843950513044444
    assert StepRng(0, 1).timesteps("matching", 4, 0, 1000).tolist() == [270, 786, 561, 527]


def test_draws_are_named_by_purpose():
    draw, again = StepRng(3, 10), StepRng(3, 10)
    first = draw.timesteps("matching", 16, 20, 981)
    draw.index("high", 3)  # another draw in between shifts nothing
    assert torch.equal(draw.timesteps("matching", 16, 20, 981), first)
    assert torch.equal(again.timesteps("matching", 16, 20, 981), first)
    for other in (StepRng(3, 11), StepRng(4, 10)):
        assert not torch.equal(other.timesteps("matching", 16, 20, 981), first)
    assert not torch.equal(draw.timesteps("score", 16, 20, 981), first)
    assert draw.seed("matching") != draw.seed("score")


@pytest.mark.parametrize(("low", "high"), [(0, 4), (20, 23)])
def test_draws_are_uniform_on_a_half_open_range(low, high):
    values = StepRng(0, 0).timesteps("matching", 4000, low, high)
    assert values.dtype == torch.int64
    shares = torch.bincount(values - low, minlength=high - low) / 4000
    assert len(shares) == high - low
    assert (shares - 1 / (high - low)).abs().max() < 0.03
    indices = [StepRng(0, step).index("high", 3) for step in range(600)]
    assert set(indices) == {0, 1, 2}
    assert all(abs(indices.count(i) / 600 - 1 / 3) < 0.08 for i in range(3))


def read(rows: StoredRows) -> Tensor:
    whole = torch.cat([tensors[index][first:last] for tensors, index, first, last in rows.parts])
    return whole if rows.columns is None else choose(whole, rows.columns)


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_stored_rows_are_cut_joined_and_chosen_from_like_a_tensor(parts):
    whole = torch.arange(18).view(9, 2)
    kept, others = [whole[:0], whole[:5]], [whole[5:6], whole[6:]]
    stored = StoredRows(((kept, 1, 0, 5), (others, 0, 0, 1), (others, 1, 0, 3)))
    chosen = choose(stored, torch.arange(9) % 2)
    for rows, expected in ((stored, whole), (chosen, choose(whole, torch.arange(9) % 2))):
        shards = split_value(rows, parts)
        assert all(map(torch.equal, map(read, shards), torch.tensor_split(expected, parts)))
        assert len(rows) == 9
        assert torch.equal(read(concat_values(shards)), expected)
