"""Batch invariance: a sample gets the same bits whatever else is in its batch.

Libraries choose kernels by the shape of a whole batch, and kernels round differently. On CPUs a sample alone and the same sample among
others differ in the last bits, which now and then changes a pixel. No library promises when, so it is measured when a model is loaded
(`invariant_sizes`): only batch sizes that give one sample the same bits, at either end of the batch, are used, and smaller batches are
filled up to one of them. `make_batch_invariant` makes more sizes agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

CANDIDATE_SIZES = (1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batch sizes that are measured. Some are just below powers of two because libraries change kernels there."""
MIN_ROWS, MIN_IMAGES = 16, 2
"""Rows of a linear layer and images of a convolution below which CPUs use other kernels."""

REORDERED: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
"""Weight of a convolution -> (its version, the same weight in oneDNN's own layout).

This second copy is made by the first lone image and lives as long as the weight. Students on one base share weights, and so these.
"""


class InvariantLinear(nn.Linear):
    """Linear layer that fills few rows up to MIN_ROWS."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows >= MIN_ROWS:
            return super().forward(x)
        filled = F.pad(x.reshape(rows, -1), (0, 0, 0, MIN_ROWS - rows))
        return super().forward(filled)[:rows].reshape(*x.shape[:-1], -1)


class InvariantConv2d(nn.Conv2d):
    """Convolution that computes one image as it would compute two.

    oneDNN does that by itself when it is given the weight in the layout that it chooses, in the time of one image. Where it cannot, the
    image is doubled.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= MIN_IMAGES:
            return super().forward(x)
        if not self._can_reorder(x):
            return super().forward(x.expand(MIN_IMAGES, -1, -1, -1).contiguous())[: len(x)]
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        version, weight = REORDERED.get(self.weight, (-1, x))
        if version != self.weight._version:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
            REORDERED[self.weight] = (self.weight._version, weight)
        # As torch.compile calls it for CPUs; no function of torch itself takes weights in this layout and plain images.
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, "none", [], "")

    def _can_reorder(self, x: Tensor) -> bool:
        return (
            torch.backends.mkldnn.is_available()
            and x.dtype == self.weight.dtype == torch.float32
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )


def make_batch_invariant(module: nn.Module) -> None:
    """Let layers of `module` compute small batches with the kernels of larger ones, for a few percent more time. For CPUs."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = InvariantLinear  # the layer stays the object that others hold
        elif type(layer) is nn.Conv2d:
            layer.__class__ = InvariantConv2d


def invariant_sizes(fingerprint: Callable[[int], bytes | None], max_size: int) -> tuple[int, ...]:
    """Find the largest set of batch sizes up to `max_size` that give a sample the same bits; ascending.

    fingerprint(size) -> the bits of one sample in a batch of that size, None when they depend on its place in the batch.
    """
    groups: dict[bytes, list[int]] = {}
    for size in (size for size in CANDIDATE_SIZES if size <= max_size):
        bits = fingerprint(size)
        if bits is not None:
            groups.setdefault(bits, []).append(size)
    assert groups, "a batch of one has no other place"
    largest: list[int] = max(groups.values(), key=lambda sizes: (len(sizes), -sizes[0]))
    return tuple(largest)


def filled_size(count: int, sizes: Sequence[int]) -> int:
    """Return the smallest of `sizes` that holds `count` samples."""
    return next(size for size in sizes if size >= count)


def shapes_of(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    """List names, shapes and dtypes of all parameters: what decides which kernels are used."""
    return tuple(
        (f"{part}.{name}", parameter.shape, parameter.dtype)
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
    )
