"""Environment variables as every process of this project reads them: empty ones are unset, loopback addresses need no proxy."""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

LOCAL = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "169.254.169.254", "metadata.google.internal")
"""This machine, and where it asks which cloud it is in (Ray does). Python's urllib compares names, requests and gRPC know networks too."""

PREFIXES = (
    *(
        "AWS_",
        "AZURE_",
        "CUDA_HOME",
        "DATABRICKS_",
        "DIFFUSERS_",
        "DS_",
        "FLASHDMD_",
        "GLOO_",
        "GOOGLE_",
        "GRPC_",
        "HF_",
    ),
    *("HOME", "HUGGING", "LOCAL_RANK", "MASTER_", "MKL_", "MLFLOW_", "NCCL_", "OMP_", "PYTORCH_", "RANK", "RAY_"),
    *("REQUESTS_CA", "SSL_CERT", "TMP", "TORCH", "TRANSFORMERS_", "TRITON_", "WORLD_SIZE", "XDG_"),
)
"""Of variables that say nothing when they are empty. (CUDA_VISIBLE_DEVICES does: no GPU.)"""
CONNECT_S = 3.0
"""Seconds for the cluster of RAY_ADDRESS to accept a connection."""


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Make the environment of this process, and of those it starts, mean what it says. Call before libraries are imported.

    Compose files and shells leave variables set and empty (`RAY_ADDRESS=${RAY_ADDRESS:-}`), which some libraries take for a value: these
    are removed. The addresses in `LOCAL` are added to no_proxy, so that no library sends the traffic of one machine to a proxy.
    """
    environment.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself at each start and stop
    for name in [name for name, value in environment.items() if not value.strip() and name.startswith(PREFIXES)]:
        del environment[name]
    given = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = [host.strip() for text in given for host in text.split(",") if host.strip()]
    bypassed = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *LOCAL]))  # urllib knows * alone only
    environment["no_proxy"] = environment["NO_PROXY"] = bypassed


def ray_address(environment: Mapping[str, str]) -> str | None:
    """Address of the cluster that RAY_ADDRESS names; None for a private Ray: unset, empty or "local"."""
    address = environment.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_ray_address(environment: Mapping[str, str]) -> None:
    """Raise ValueError, within seconds and without Ray, where RAY_ADDRESS names no address at which something listens."""
    address = ray_address(environment)
    if address in (None, "auto"):
        return
    assert address is not None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    where = f"RAY_ADDRESS={address}: cannot join a Ray there"
    remedy = "or unset RAY_ADDRESS for a private Ray"
    if "://" in host or not host or not port.isdecimal():
        raise ValueError(
            f"{where}: a cluster is joined at HOST:PORT of its head, such as 10.0.0.1:6379; correct it, {remedy}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"{where} ({error}); start it, correct the address, {remedy}") from None
