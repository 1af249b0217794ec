"""Count the floating-point operations and the live memory of calls, whatever device their tensors are on.

On the meta device nothing is computed and nothing is allocated, but every tensor has its size and its lifetime, so the highest sum of
living tensors is what an allocator without fragmentation would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Use:
    """One call. flops: two for each multiply-add. kept, peak: bytes over those that were there before; kept is what the graph holds
    between forward and backward, peak the most at any time. Gradients of parameters are not counted, one at a time apart."""

    flops: float
    kept: float
    peak: float


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that were made inside this context and still live. `existing` ones count nothing."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        # Held: a storage that went would leave its address to another one.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._sizes = {storage._cdata: 0 for storage in self._existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that keeps no matrix of scores, as on CUDA and on CPUs; the meta device alone would write one.

    The function is replaced, not intercepted by a mode: modes are off while a backward computes checkpointed blocks again.
    """
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


class Observer:
    """Observes calls of one network."""

    def __init__(self, module: torch.nn.Module, inputs: Iterable[Tensor]) -> None:
        self._module = module
        self._there = [*module.parameters(), *module.buffers(), *inputs]
        self._on_meta = any(tensor.is_meta for tensor in self._there)

    def forward(self, call: Callable[[], Tensor]) -> Use:
        """A call without gradients."""
        with torch.no_grad(), self._watch() as seen:
            call()
        return Use(seen.flops, 0.0, seen.memory.peak)

    def training(self, call: Callable[[], Tensor], towards: Iterable[Tensor] | None = None) -> Use:
        """A call and its backward, to the parameters that require gradients or `towards` these tensors alone.

        A parameter's gradient is dropped as soon as it is complete, as an engine takes it over.
        """
        leaves = None if towards is None else list(towards)
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in self._module.parameters() if p.requires_grad]
        try:
            with self._watch() as seen:
                output = call()
                kept = seen.memory.live
                torch.autograd.backward([output], [torch.empty_like(output)], inputs=leaves)
                del output
        finally:
            for hook in hooks:
                hook.remove()
            for leaf in leaves or ():
                leaf.grad = None
        return Use(seen.flops, kept, seen.memory.peak)

    def _watch(self) -> _Watch:
        return _Watch(LiveMemory(self._there), self._on_meta)


class _Watch(ExitStack):
    def __init__(self, memory: LiveMemory, on_meta: bool) -> None:
        super().__init__()
        self.memory = memory
        self._counter = FlopCounterMode(display=False)
        self._on_meta = on_meta

    def __enter__(self) -> Self:
        if self._on_meta:
            self.enter_context(fused_attention())
        self.enter_context(self.memory)
        self.enter_context(self._counter)
        return self

    @property
    def flops(self) -> float:
        return float(self._counter.get_total_flops())


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
