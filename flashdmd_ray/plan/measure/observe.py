"""Count the floating-point operations and the live memory of calls, whatever device their tensors are on.

On the meta device nothing is computed and nothing is allocated, but every tensor has its size and its lifetime, so the highest sum of
living tensors is what an allocator without fragmentation would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Use:
    """One call.

    flops: two for each multiply-add. kept, peak: bytes over those that were there before; kept is what the graph holds between forward
    and backward, peak the most at any time. Gradients of parameters are not counted, one at a time apart. launches: operations that make
    a tensor or change one, each a kernel or more.
    """

    flops: float
    kept: float
    peak: float
    launches: float


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that were made inside this context and still live. `existing` ones count nothing.

    May be entered again: what lives goes on counting. launches: operations so far that made a tensor or changed one.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.launches = 0
        # Held: a storage that went would leave its address to another one.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._sizes = {storage._cdata: 0 for storage in self._existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [self._see(tensor.untyped_storage()) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.launches += any(made) or func._schema.is_mutable
        return result

    def _see(self, storage: torch.UntypedStorage) -> bool:
        if storage._cdata in self._sizes:
            return False
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)
        return True

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
    if (
        attn_mask is not None and attn_mask.requires_grad
    ):  # a bias that is learnt from: the one fused kernel with its gradient
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


class Observer:
    """Observes calls of one network, each in two passes.

    The operation counter keeps what gradient checkpointing computes again alive until it ends (torch's module tracker holds it), so
    memory is measured without it.
    """

    def __init__(self, module: torch.nn.Module, inputs: Iterable[Tensor]) -> None:
        self._module = module
        self._there = [*module.parameters(), *module.buffers(), *inputs]
        self._on_meta = any(tensor.is_meta for tensor in self._there)

    def forward(self, call: Callable[[], Tensor]) -> Use:
        """A call without gradients."""
        with torch.no_grad(), self._attention(), LiveMemory(self._there) as memory:
            call()
        with torch.no_grad():
            return Use(self._flops(call), 0.0, memory.peak, memory.launches)

    def training(self, call: Callable[[], Tensor], towards: Iterable[Tensor] | None = None) -> Use:
        """A call and its backward, to the parameters that require gradients or `towards` these tensors alone.

        A parameter's gradient is dropped as soon as it is complete, as an engine takes it over.
        """
        leaves = None if towards is None else list(towards)
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in self._module.parameters() if p.requires_grad]
        kept = 0

        def there_and_back() -> None:
            nonlocal kept
            output = call()
            kept = memory.live
            torch.autograd.backward([output], [torch.empty_like(output)], inputs=leaves)

        memory = LiveMemory(self._there)
        try:
            with self._attention(), memory:
                there_and_back()
            seen = Use(0.0, kept, memory.peak, memory.launches)
            return replace(seen, flops=self._flops(there_and_back))
        finally:
            for hook in hooks:
                hook.remove()
            for leaf in leaves or ():
                leaf.grad = None

    def _flops(self, call: Callable[[], object]) -> float:
        with self._attention(), FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    def _attention(self) -> AbstractContextManager[None]:
        return fused_attention() if self._on_meta else nullcontext()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
