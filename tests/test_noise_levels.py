"""Where the two forwards of an update are made: the driver's draw, and that each sample's coarse forward is at its own step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.batch import NoiseLevels, Prompts, StepRng
from flashdmd_ray.config import parse_config
from flashdmd_ray.driver import sample_noise_levels
from flashdmd_ray.roles.generator import Generator
from tests.levels import levels
from tests.tiny import save_sdxl


@given(
    steps=st.sampled_from([(999,), (999, 499), (999, 749, 499, 249)]),
    split=st.sampled_from(["timestep_aware", "shared"]),
    drawn_for=st.sampled_from(["sample", "batch"]),
    step=st.integers(0, 1000),
)
def test_the_draw(steps, split, drawn_for, step):
    matching = {"timestep_split": split, "timestep_per": drawn_for}
    config = parse_config({"sampling": {"timesteps": steps}, "batch": 200, "matching": matching} | needs(steps))
    found = sample_noise_levels(config, StepRng(3, step), "predict")
    apart = split == "timestep_aware" and len(steps) > 1
    assert found.low_noise == (steps[-1] if apart else None)
    allowed = range(len(steps) - 1 if apart else len(steps))
    drawn = set(found.high_noise.tolist())
    assert len(found) == 200
    assert drawn <= set(allowed)
    assert found.max_step == max(drawn)
    # That none of 200 samples draws a step happens once in 10^24 draws.
    assert drawn == set(allowed) if drawn_for == "sample" else len(drawn) == 1


def needs(steps: tuple[int, ...]) -> dict:
    """What else a one-step generator's configuration has to say."""
    return {"preference": {"updates": 0}} if len(steps) == 1 else {}


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    teacher = save_sdxl(tmp_path_factory.mktemp("teacher"))
    return Generator.from_config(parse_config({"model": {"teacher": str(teacher)}}))


def test_every_sample_is_predicted_at_its_own_step(generator):
    prompts = Prompts(("a red 4", "two 7s", "a blue 1", "a 3"), torch.arange(4))
    own = torch.tensor([2, 0, 1, 2])
    mixed = generator.sample_fakes(prompts, NoiseLevels(own, 2, 249), seed=5)
    for step in range(3):
        alike = generator.sample_fakes(prompts, levels(prompts, step), seed=5)
        rows = own == step
        torch.testing.assert_close(mixed.high_noise.values[rows], alike.high_noise.values[rows])
        assert not torch.allclose(mixed.high_noise.values[~rows], alike.high_noise.values[~rows])
        torch.testing.assert_close(mixed.low_noise.values, alike.low_noise.values)  # all end in the same clean samples


def test_simulating_deeper_than_needed_changes_nothing(generator):
    """Ranks simulate to the deepest step of the global batch, whatever their own samples drew."""
    prompts = Prompts(("a red 4", "two 7s"), torch.arange(2))
    drawn = torch.tensor([0, 1])
    needed, deeper = (generator.sample_fakes(prompts, NoiseLevels(drawn, max_step, 249), seed=5) for max_step in (1, 2))
    assert torch.equal(needed.high_noise.values, deeper.high_noise.values)
    assert torch.equal(needed.low_noise.values, deeper.low_noise.values)
