"""Executors of commands that are no training jobs: threads of this process, or the Ray of RAY_ADDRESS."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from flashdmd_ray.data.executor import Executor, in_threads
from flashdmd_ray.run.variables import check_ray_address


def add_workplace(parser: argparse.ArgumentParser) -> None:
    """Add the options of `workplace`, for networks: --device, --workers, --runtime."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where this machine has one)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="Ray actors, with a GPU each (default: %(default)s)"
    )
    parser.add_argument(
        "--runtime", choices=["local", "ray"], default="local", help="ray: on the cluster of RAY_ADDRESS"
    )


def device_of(options: argparse.Namespace) -> str:
    """The device of each worker. Raises ValueError for several workers without Ray: they would share one network."""
    import torch

    if options.workers < 1 or (options.runtime == "local" and options.workers > 1):
        raise ValueError(f"--workers {options.workers}: 1, or more with --runtime ray")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def workplace(runtime: str, gpus: float = 0) -> Iterator[Executor]:
    """The executor for `runtime`, local or ray; gpus: of each Ray actor."""
    if runtime == "local":
        yield in_threads
        return
    check_ray_address(os.environ)
    from flashdmd_ray.runtime.data_stream import on_ray, start_ray

    cluster = start_ray()
    try:
        yield partial(on_ray, gpus=gpus)
    finally:
        cluster.leave()


def announce(text: str) -> None:
    """Print how far the work is, at once."""
    print(text, flush=True)
