"""What is split and joined must come back as it was."""

import pytest
import torch

from flashdmd_ray.batch import Latents, Prompts
from flashdmd_ray.runtime.shards import join_results, split_arguments


def latents(count: int) -> Latents:
    prompts = Prompts(tuple(f"text {i}" for i in range(count)), torch.arange(count))
    return Latents(torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(0)), prompts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_arguments_come_back(ranks: int) -> None:
    batch, timesteps, texts = latents(5), torch.arange(5), tuple("abcde")
    shards, sizes = split_arguments((batch, 7, None, ()), {"timesteps": timesteps, "texts": texts}, ranks)
    assert len(shards) == ranks
    joined = join_results([(args[0], kwargs["timesteps"], kwargs["texts"]) for args, kwargs in shards], sizes)
    assert torch.equal(joined[0].values, batch.values)
    assert joined[0].prompts.texts == batch.prompts.texts
    assert torch.equal(joined[1], timesteps)
    assert joined[2] == texts
    assert all(args[1:] == (7, None, ()) for args, _ in shards)
    if ranks > 1:
        assert sum(sizes) == 5
        assert max(sizes) - min(sizes) <= 1


def test_metrics_are_means_over_samples() -> None:
    _, sizes = split_arguments((torch.arange(3),), {}, 2)
    assert join_results([{"loss": 1.0}, {"loss": 4.0}], sizes) == {"loss": 2.0}
    assert join_results([(torch.zeros(2), {"loss": 1.0}), (torch.zeros(1), {"loss": 4.0})], sizes)[1] == {"loss": 2.0}


def test_weights_come_from_rank_0() -> None:
    weights = {"w": torch.ones(2)}
    assert join_results([weights, {}], [1, 1]) is weights
    assert join_results([weights, weights], [1, 1])["w"].tolist() == [1, 1, 1, 1]


def test_unusable_batches() -> None:
    with pytest.raises(ValueError, match="cannot split a batch of 1 over 2 ranks"):
        split_arguments((torch.arange(1),), {}, 2)
    with pytest.raises(ValueError, match="different sizes: 4, 6"):
        split_arguments((torch.arange(4), torch.arange(6)), {}, 2)


def test_ranks_that_disagree() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        join_results([3, 4], [1, 1])
