"""Data sets through Ray Data: work on any CPU of the cluster, streamed, in order."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.build import open_batch_reader
from flashdmd_ray.data.executor import BatchWorker, MakeWorker
from flashdmd_ray.data.file_source import FileSource
from flashdmd_ray.data.image_reader import ImageReader
from flashdmd_ray.data.prefetch import Decoded, Size, ThreadDecoder, stride
from flashdmd_ray.runtime.environment import use_loopback, worker_environment

BATCHES = 1000
"""Batches of one stream; then the next begins. Ray Data has to know the end of what it reads."""


def on_ray(make_worker: MakeWorker, items: Sequence[Any], workers: int, gpus: float = 0) -> Iterator[Any]:
    """`data.executor.Executor` on the Ray this process talks to: `workers` actors, each with a callable and `gpus` of its own.

    Ray Data keeps a few results ahead of what is taken, as far as its share of the object store goes.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        data = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        done = data.map_batches(
            BatchWorker,
            fn_constructor_args=(make_worker,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            num_cpus=0.5,
            num_gpus=gpus,
            runtime_env={"env_vars": worker_environment(threads=1, gpus=gpus)},
        )
        for row in done.iter_rows():
            yield pickle.loads(row["result"])  # our own worker made it a moment ago


class RayDecoder:
    """`data.prefetch.Decoder` through Ray Data. The first batches are decoded here, until two of them have shown the stride."""

    def __init__(self, config: DataConfig, images: ImageReader) -> None:
        self._config = config
        self._seed = images.order.seed
        self._here = ThreadDecoder(images, config.workers, batches=0)
        self._last: tuple[int, ...] = ()
        self._expected: list[list[int]] = []
        self._stream: Iterator[list[Decoded]] | None = None
        self._size: Size | None = None

    def take(self, positions: Sequence[int], size: Size) -> list[Decoded]:
        now = list(positions)
        if self._stream is not None and self._expected and self._expected[-1] == now and self._size == size:
            self._expected.pop()
            decoded = next(self._stream)
        else:
            decoded = self._here.take(now, size)
            self._begin(now, size)
        self._last = tuple(now)
        return decoded

    def _begin(self, now: list[int], size: Size) -> None:
        self.close()
        step = stride(self._last, now)
        if step is None:
            return
        batches = [[p + k * step for p in now] for k in range(1, BATCHES + 1)]
        self._expected, self._size = batches[::-1], size
        self._stream = on_ray(partial(open_batch_reader, self._config, self._seed, size), batches, self._config.workers)

    def close(self) -> None:
        """End the stream and its processes."""
        if self._stream is not None:
            with closing(self._stream):  # type: ignore[type-var]
                self._stream = None


def decode_on_ray(roles: Sequence[Any], config: DataConfig) -> None:
    """Let roles that read real images from files take them from Ray Data."""
    for role in roles:
        source = getattr(role, "images", None)
        if isinstance(source, FileSource):
            source.decoder = RayDecoder(config, source.images)


def start_ray() -> Any:
    """Connect a command that is no training job to the Ray of RAY_ADDRESS, or to a private one. Leave it with `leave()`."""
    use_loopback(os.environ)
    from flashdmd_ray.runtime.cluster import Cluster

    return Cluster.join()
