"""The world: splits, captions, rendering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    Digit,
    SceneAttributes,
    caption_is_held_out,
    digit_indices,
    parse_caption,
    render,
    sample_scenes,
)

_DIGITS = st.builds(Digit, st.integers(0, 9), st.sampled_from(list(COLOURS)))
_SINGLE = st.builds(SceneAttributes, st.tuples(_DIGITS), st.none(), st.sampled_from(list(BACKGROUNDS)))
_PAIR = st.builds(
    SceneAttributes,
    st.tuples(_DIGITS, _DIGITS),
    st.sampled_from(list(RELATIONS)),
    st.sampled_from(list(BACKGROUNDS)),
)


@given(st.one_of(_SINGLE, _PAIR))
def test_caption_and_parser_are_inverse(attributes: SceneAttributes) -> None:
    assert parse_caption(attributes.caption) == attributes


@pytest.mark.parametrize(
    "text",
    ["", "a red 4", "a pink 4 on a gray background", "a red 4 left of a green 7", "a red 14 on a gray background"],
)
def test_parser_refuses_other_texts_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="not a digit-scene caption") as error:
        parse_caption(text)
    assert "\n" not in str(error.value)


def test_splits_share_no_digit_image_and_cover_all() -> None:
    train, held_out = (np.concatenate(digit_indices(split)) for split in ("train", "held_out"))
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == 1797
    assert all(len(indices) >= 30 for indices in digit_indices("held_out"))


def test_splits_share_no_pair_caption_and_use_their_own_images() -> None:
    for split in ("train", "held_out"):
        own = set(np.concatenate(digit_indices(split)).tolist())
        for scene in sample_scenes(500, split, 3):
            assert {p.image_index for p in scene.placements} <= own
            if scene.attributes.relation is not None:
                assert caption_is_held_out(scene.attributes) == (split == "held_out")


def test_same_seed_same_scenes_and_pixels() -> None:
    first, again, other = (sample_scenes(40, "train", seed) for seed in (5, 5, 6))
    assert first == again != other
    images, masks = render(first)
    images_again, masks_again = render(again)
    assert torch.equal(images, images_again)
    assert torch.equal(masks, masks_again)
    assert torch.equal(images[7:9], render(first[7:9])[0]), "a scene's pixels depend on its neighbours"


def test_render_shapes_range_and_masks() -> None:
    scenes = sample_scenes(200, "train", 1)
    images, masks = render(scenes)
    assert images.shape == (200, 3, 24, 24)
    assert images.dtype == torch.float32
    assert masks.shape == (200, 2, 24, 24)
    assert images.min() >= -1
    assert images.max() <= 1
    two = torch.tensor([scene.attributes.relation is not None for scene in scenes])
    assert torch.equal(masks[:, 1].flatten(1).any(1), two)
    assert masks[:, 0].flatten(1).sum(1).min() >= 5
    assert not (masks[:, 0] & masks[:, 1]).any()


def test_relation_is_where_the_caption_says() -> None:
    scenes = [scene for scene in sample_scenes(300, "held_out", 2) if scene.attributes.relation is not None]
    _, masks = render(scenes)
    position = torch.arange(24.0)
    x = (masks.sum(2) * position).sum(2) / masks.sum((2, 3))
    y = (masks.sum(3) * position).sum(2) / masks.sum((2, 3))
    for row, scene in enumerate(scenes):
        assert scene.attributes.relation is not None
        dx, dy = RELATIONS[scene.attributes.relation]
        assert (x[row, 0] - x[row, 1]) * dx + (y[row, 0] - y[row, 1]) * dy > 5
