"""Environment variables as every process of this project reads them: empty ones are unset, loopback addresses need no proxy."""

from __future__ import annotations

from collections.abc import MutableMapping

LOCAL = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "169.254.169.254", "metadata.google.internal")
"""This machine, and where it asks which cloud it is in (Ray does). Python's urllib compares names, requests and gRPC know networks too."""

PREFIXES = (
    "RAY_",
    "HF_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "MLFLOW_",
    "NCCL_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "FLASHDMD_",
    "XDG_",
    "TMP",
)
"""Of variables that say nothing when they are empty. (CUDA_VISIBLE_DEVICES does: no GPU.)"""


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Make the environment of this process, and of those it starts, mean what it says. Call before libraries are imported.

    Compose files and shells leave variables set and empty (`RAY_ADDRESS=${RAY_ADDRESS:-}`), which some libraries take for a value: these
    are removed. The addresses in `LOCAL` are added to no_proxy, so that no library sends the traffic of one machine to a proxy.
    """
    for name in [name for name, value in environment.items() if not value and name.startswith(PREFIXES)]:
        del environment[name]
    given = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = [host.strip() for text in given for host in text.split(",") if host.strip()]
    bypassed = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *LOCAL]))  # urllib knows * alone only
    environment["no_proxy"] = environment["NO_PROXY"] = bypassed
