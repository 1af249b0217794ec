"""Checksum of a set of weights, computed when they are published and again by every rollout worker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a hex digest over names, dtypes, shapes and exact bytes, independent of device and of the mapping's order.

    A worker that loaded published weights computes this over what its network now holds. A difference means that the network does not run
    on the weights it was sent, which must stop the run: rewards would be optimised for a generator that nobody trains.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
