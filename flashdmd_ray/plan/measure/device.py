"""The GPUs of this machine."""

from __future__ import annotations

import torch


def gpu_memories() -> list[int]:
    """Bytes of memory of each GPU that PyTorch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(index).total_memory for index in range(count)]


def smallest_gpu() -> int | None:
    """Bytes of memory of the GPU with the least; None without one."""
    return min(gpu_memories(), default=None)
