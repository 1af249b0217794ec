"""The same bits for a sample whatever is drawn beside it.

Libraries choose kernels by the shape of a whole batch, and kernels round differently: on CPUs a sample alone and the same sample among
others differ in the last bits, which now and then is a pixel. What each library does is not promised anywhere, so it is measured when a
model is loaded: only batch sizes that give one sample the same bits, at either end of the batch, are used (`agreeing_sizes`), and smaller
batches are filled up. `steady` makes more sizes agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batch sizes that are tried. Those just below powers of two are there because libraries change kernels at such numbers."""
ROWS, IMAGES = 16, 2
"""A CPU's kernels for fewer rows of a linear layer, or fewer images of a convolution, are others."""

LAID_OUT: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
"""Weights of convolutions -> their version, and they as oneDNN wants them: a second copy while they live, made by a first single image.
Students on one base share weights, and so these."""


class SteadyLinear(nn.Linear):
    """Few rows are filled up."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows >= ROWS:
            return super().forward(x)
        filled = F.pad(x.reshape(rows, -1), (0, 0, 0, ROWS - rows))
        return super().forward(filled)[:rows].reshape(*x.shape[:-1], -1)


class SteadyConv2d(nn.Conv2d):
    """One image is computed as two would be. oneDNN does that when it is given the weights in the layout that it chooses for itself,
    in the time of one image; where it cannot, the image is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= IMAGES:
            return super().forward(x)
        if not self._has_layout(x):
            return super().forward(x.expand(IMAGES, -1, -1, -1).contiguous())[: len(x)]
        place = (self.padding, self.stride, self.dilation, self.groups)
        version, laid_out = LAID_OUT.get(self.weight, (-1, x))
        if version != self.weight._version:
            laid_out = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *place, list(x.shape))
            LAID_OUT[self.weight] = (self.weight._version, laid_out)
        # As torch.compile calls it for CPUs; no function of torch itself takes weights in this layout and plain images.
        return torch.ops.mkldnn._convolution_pointwise(x, laid_out, self.bias, *place, "none", [], "")

    def _has_layout(self, x: Tensor) -> bool:
        return (
            torch.backends.mkldnn.is_available()
            and x.dtype == self.weight.dtype == torch.float32
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )


def steady(module: nn.Module) -> None:
    """Let the layers of `module` compute small batches with the kernels of larger ones, for a few percent more time. For CPUs."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = SteadyLinear  # the layer stays the object that others hold
        elif type(layer) is nn.Conv2d:
            layer.__class__ = SteadyConv2d


def agreeing_sizes(fingerprint: Callable[[int], bytes | None], most: int) -> tuple[int, ...]:
    """The batch sizes, ascending, that give a sample the same bits: the largest such set of CANDIDATES up to `most`.

    fingerprint(size) -> the bits of one sample in a batch of that size, None when they depend on its place there.
    """
    groups: dict[bytes, list[int]] = {}
    for size in (size for size in CANDIDATES if size <= most):
        bits = fingerprint(size)
        if bits is not None:
            groups.setdefault(bits, []).append(size)
    assert groups, "a batch of one has no other place"
    chosen: list[int] = max(groups.values(), key=lambda sizes: (len(sizes), -sizes[0]))
    return tuple(chosen)


def filled_size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that holds `count` samples."""
    return next(size for size in sizes if size >= count)


def shapes_of(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    """What decides which kernels are used, of some modules."""
    return tuple(
        (f"{part}.{name}", parameter.shape, parameter.dtype)
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
    )
