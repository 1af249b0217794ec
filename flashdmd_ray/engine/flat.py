"""Layout of a module's trained parameters in one flat fp32 vector.

Engines keep weights, gradients and AdamW moments as flat vectors, because that is how ZeRO partitions them: a rank owns a slice of the
vector. Checkpoints speak in parameter names. This is the map between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FlatLayout:
    """Names and shapes of the trained parameters, in the module's own order, one after the other without padding."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, module: nn.Module) -> FlatLayout:
        """Return the layout of the parameters with `requires_grad`. Raises ValueError when there are none."""
        trained = [(name, p.shape) for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                f"{type(module).__name__} has no trained parameter: requires_grad is False for all of them"
            )
        return cls(tuple(name for name, _ in trained), tuple(shape for _, shape in trained))

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @cached_property
    def starts(self) -> list[int]:
        """Start of each parameter in the flat vector."""
        starts, start = [], 0
        for shape in self.shapes:
            starts.append(start)
            start += shape.numel()
        return starts

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat` (at least (numel,)), one per parameter, with the parameters' shapes."""
        return [
            flat[start : start + shape.numel()].view(shape)
            for start, shape in zip(self.starts, self.shapes, strict=True)
        ]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError naming the first parameter that is missing in `tensors`, unknown or of another shape."""
        missing = [name for name in self.names if name not in tensors]
        names = set(self.names)
        unknown = [name for name in tensors if name not in names]
        if missing or unknown:
            what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the network does not train"
            raise ValueError(
                f"saved state {what} ({len(missing)} missing, {len(unknown)} unknown): was it written for another network?"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ValueError(
                    f"saved {name!r} has shape {tuple(tensors[name].shape)}, the network needs {tuple(shape)}"
                )
