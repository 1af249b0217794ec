"""Process settings: threads, memory allocator, offline mode, addresses. Imports no Ray, and no torch at import."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from flashdmd_ray.run.variables import prepare_environment, ray_address

PASSED_ON = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "NCCL_DEBUG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)

DEFAULT_FOLDER = "/tmp"
SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket on Linux."""
LONGEST_SOCKET = "/ray/session_2026-11-30_23-59-59_999999_4194304/sockets/plasma_store.1"
"""Below Ray's temporary folder."""


def worker_environment(threads: int, gpus: float) -> dict[str, str]:
    """Return the environment variables of one worker process, on top of those of its machine."""
    environment = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Networks allocate and free the same few megabytes all the time. By default glibc hands them back to the
        # kernel on every free, which cost a third of the system time of small CPU runs.
        "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
        "MALLOC_ARENA_MAX": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }
    if not gpus:
        # Ray does not hide GPUs from workers that asked for none.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


@contextmanager
def uncollected() -> Iterator[None]:
    """Import libraries in this block: without garbage collections, which take a fifth of the time, and with none over them later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def limit_threads(threads: int) -> None:
    """Let torch use `threads` threads in this process.

    The order of floating-point sums depends on it, so both runtimes call this.
    """
    import torch

    torch.set_num_threads(threads)


def on_gpu() -> None:
    """Settings of torch in a process whose networks compute on a GPU; call before the first of them is there.

    Products of float32 matrices may use TF32, which is 7 to 8 times as fast and keeps 10 bits of the mantissa. Memory is taken in
    segments that can grow: the shapes of a step alternate all the time, and fixed blocks would not fit one another.
    """
    import torch

    torch.set_float32_matmul_precision("high")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_loopback(environment: MutableMapping[str, str]) -> None:
    """Keep a Ray that this job starts for itself off the network, and patient on a busy machine.

    Ray replaces 127.0.0.1 by the address of a network interface and then listens there. It has a switch for systems
    whose firewall would ask the user; despite the switch's name it works everywhere. All of these are read when `ray`
    is imported and are inherited by every Ray process. In a cluster (RAY_ADDRESS) its own settings hold.
    """
    prepare_environment(environment)
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray_address(environment) is None:
        # Serve's replicas listen on all interfaces, whatever the address.
        environment.setdefault("RAY_AUTH_MODE", "token")
        environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        environment.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "180")
        environment.setdefault("RAY_gcs_server_port_wait_time_s", "180")
        use_short_folder(environment)


def use_short_folder(environment: MutableMapping[str, str]) -> None:
    """Have Ray keep its sockets in /tmp where the temporary folder's path is too long for them.

    Batch systems and test runners set long ones. Raises ValueError for a RAY_TMPDIR that is too long.
    """
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or DEFAULT_FOLDER
    if len(os.fsencode(folder + LONGEST_SOCKET)) <= SOCKET_PATH_BYTES:
        return
    if "RAY_TMPDIR" in environment:
        most = SOCKET_PATH_BYTES - len(LONGEST_SOCKET)
        raise ValueError(
            f"RAY_TMPDIR: {folder} is too long for Ray's sockets; set one of at most {most} bytes, such as {DEFAULT_FOLDER}"
        )
    environment["RAY_TMPDIR"] = DEFAULT_FOLDER


def use_quick_handles(environment: MutableMapping[str, str]) -> None:
    """Choose Serve's documented throughput settings for calls of handles.

    gRPC, and no thread of its own for a replica's code, which here is asynchronous and generates in a thread of ours. Read when
    `ray.serve` is imported and inherited by its processes; in a cluster (RAY_ADDRESS) its own settings hold.
    """
    if ray_address(environment) is None:
        environment.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
        environment.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
