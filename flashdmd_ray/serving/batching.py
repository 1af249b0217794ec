"""Continuous batching: one thread makes one denoising step after the other, each for as many samples as fit together.

Samples that share a network and a size share forwards, whatever step each is at. Jobs go first come, first served; a job that
nobody waits for any more is dropped before the next forward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.student import Artist, Sample, Size

log = logging.getLogger(LOGGER)


@dataclass
class Job:
    """One request. future: pixels uint8 (N, H, W, 3), or what went wrong; cancelled from outside, it ends the work."""

    artist: Artist
    prompt: str
    seeds: Sequence[int]
    steps: int
    size: Size
    future: Future[Tensor] = field(default_factory=Future)
    came: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    batch: int = 0
    """Samples in the largest forward it took part in."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def queue_s(self) -> float:
        return (self.began or time.monotonic()) - self.came

    @property
    def draw_s(self) -> float:
        return 0.0 if self.began is None else (self.ended or time.monotonic()) - self.began

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()


class DrawingThread:
    """The thread and its jobs. Threads that add jobs never wait for a forward."""

    def __init__(self, most: int) -> None:
        """most: samples in one forward."""
        self._most = most
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self.forwards = 0
        """Denoising steps made, each of a batch."""
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        with self._changed:
            assert not self._closed, "the service is going down"
            self._jobs.append(job)
            self._changed.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Jobs that are not done."""
        return len(self._jobs)

    def close(self, patience_s: float) -> None:
        """No further jobs; waits until those that are there are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                self._jobs = [job for job in self._jobs if not job.abandoned]
                jobs = list(self._jobs)
            if jobs:
                self._step(jobs)

    def _step(self, jobs: Sequence[Job]) -> None:
        """One forward for the first job and whatever goes with it; failures are of the jobs in it alone."""
        first = jobs[0]
        group = [job for job in jobs if job.artist is first.artist and job.size == first.size]
        try:
            chosen = self._choose(group)
            first.artist.advance([sample for _, sample in chosen])
            self.forwards += 1
            for job in {id(job): job for job, _ in chosen}.values():
                job.batch = max(job.batch, len(chosen))
            done = [job for job in group if job.samples and all(sample.finished for sample in job.samples)]
            if done:
                self._finish(first.artist, done)
        except Exception as error:
            log.exception("drawing failed")
            self._end(group, error)

    def _choose(self, group: Sequence[Job]) -> list[tuple[Job, Sample]]:
        """The samples of the next forward, in the order in which their jobs came."""
        most = min(self._most, group[0].artist.most(group[0].size))
        chosen: list[tuple[Job, Sample]] = []
        group[0].artist.read([job.prompt for job in group[:most] if not job.samples])
        for job in group:
            if not job.samples:
                job.began = time.monotonic()
                job.samples = [job.artist.begin(job.prompt, seed, job.steps, job.size) for seed in job.seeds]
            chosen += [(job, sample) for sample in job.samples if not sample.finished]
            if len(chosen) >= most:
                break
        return chosen[:most]

    def _finish(self, artist: Artist, done: Sequence[Job]) -> None:
        """Decode what ended with this forward; a job never waits for samples of another."""
        samples = [sample for job in done for sample in job.samples]
        most = min(self._most, artist.most(done[0].size))
        pieces = [artist.decode(samples[start : start + most]) for start in range(0, len(samples), most)]
        self._remove(done)
        for job, images in zip(done, torch.cat(pieces).split([len(job.samples) for job in done]), strict=True):
            job.ended = time.monotonic()
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(images)

    def _end(self, jobs: Sequence[Job], error: Exception) -> None:
        self._remove(jobs)
        for job in jobs:
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _remove(self, jobs: Sequence[Job]) -> None:
        gone = set(map(id, jobs))
        with self._changed:
            self._jobs = [job for job in self._jobs if id(job) not in gone]
