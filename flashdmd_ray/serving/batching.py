"""Continuous batching: one thread makes one denoising step after the other, each for as many samples as fit together.

Samples that share a network and a size share forwards, whatever step each is at. Clients take turns, and so do the models of a client;
jobs of one client and model go first come, first served. A job that nobody waits for any more is dropped before the next forward, and
one that would not be done in time is not taken.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.fair_turns import FairTurns
from flashdmd_ray.serving.messages import Size
from flashdmd_ray.serving.step_sampler import Sample, StepSampler

log = logging.getLogger(LOGGER)

LEARNING_RATE = 0.2
"""Weight of a new measurement in the running mean of seconds per step."""


@dataclass
class SamplingJob:
    """One request on the thread. future: pixels uint8 (N, H, W, 3), or the error; cancelled from outside, it ends the work."""

    sampler: StepSampler
    prompt: str
    seeds: Sequence[int]
    steps: int
    size: Size
    client: str = ""
    future: Future[Tensor] = field(default_factory=Future)
    added: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    batch: int = 0
    """Samples in the largest forward it took part in."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def model(self) -> StepSampler:
        return self.sampler

    @property
    def remaining_s(self) -> float:
        """Seconds that its steps take of the thread in large batches; 0 where nothing was measured."""
        done = sum(sample.done for sample in self.samples)
        steps = self.steps * len(self.seeds) - done
        return steps * self.sampler.step_s.get(self.size, 0.0)

    @property
    def queue_s(self) -> float:
        """Seconds before the first forward."""
        return (self.began or time.monotonic()) - self.added

    @property
    def sampling_s(self) -> float:
        """Seconds from the first forward to the pixels."""
        return 0.0 if self.began is None else (self.ended or time.monotonic()) - self.began

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()


class SamplingThread:
    """The thread and its jobs. Callers of `add` never wait for a forward."""

    def __init__(self, max_batch: int) -> None:
        """max_batch: samples in one forward."""
        self._max_batch = max_batch
        self._jobs: list[SamplingJob] = []
        self._changed = threading.Condition()
        self._closed = False
        self._turns = FairTurns()
        self.forwards = 0
        """Denoising steps made, each of a batch."""
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def add(self, job: SamplingJob, timeout_s: float = math.inf) -> float | None:
        """Queue a job, whose future gets the result; returns None.

        A job that is not expected to be done in `timeout_s` is not queued; returns the seconds that it is expected to take.
        """
        with self._changed:
            assert not self._closed, "the service is going down"
            expected_s = _expected_s(job, self._jobs)
            if expected_s > timeout_s:
                return expected_s
            self._jobs.append(job)
            self._changed.notify()
            return None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Number of jobs that are not done."""
        return len(self._jobs)

    def close(self, timeout_s: float) -> None:
        """Take no further jobs and wait until those that are there are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

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

    def _step(self, jobs: Sequence[SamplingJob]) -> None:
        """Make one forward for the job whose turn it is and those it can share it with; an error ends these jobs alone."""
        first = self._turns.first(jobs)
        group = [job for job in jobs if job.sampler is first.sampler and job.size == first.size]
        group = self._turns.arrange(group, first)
        began = time.monotonic()
        try:
            batch = self._next_batch(group)
            first.sampler.advance([sample for _, sample in batch])
            self.forwards += 1
            for job, _ in batch:
                job.batch = max(job.batch, len(batch))
            done = [job for job in group if job.samples and all(sample.finished for sample in job.samples)]
            if done:
                self._finish(first.sampler, done)
            self._account([job for job, _ in batch], (time.monotonic() - began) / len(batch))
        except Exception as error:
            log.exception("drawing failed")
            self._fail(group, error)

    def _account(self, jobs: Sequence[SamplingJob], step_s: float) -> None:
        """Charge a forward to its jobs, one entry for each sample, and learn from it how long large batches take."""
        sampler, size = jobs[0].sampler, jobs[0].size
        for job in jobs:
            self._turns.charge(job, step_s)
        before = sampler.step_s.get(size, step_s)
        if 2 * len(jobs) >= min(self._max_batch, sampler.max_batch(size)) or step_s < before:
            sampler.step_s[size] = before + LEARNING_RATE * (step_s - before)

    def _next_batch(self, group: Sequence[SamplingJob]) -> list[tuple[SamplingJob, Sample]]:
        """Begin jobs in their order until a forward is full; returns the forward's samples."""
        sampler, size = group[0].sampler, group[0].size
        limit = min(self._max_batch, sampler.max_batch(size))
        batch: list[tuple[SamplingJob, Sample]] = []
        sampler.encode([job.prompt for job in group[:limit] if not job.samples])
        for job in group:
            if not job.samples:
                job.began = time.monotonic()
                job.samples = [sampler.begin(job.prompt, seed, job.steps, size) for seed in job.seeds]
            batch += [(job, sample) for sample in job.samples if not sample.finished]
            if len(batch) >= limit:
                break
        return batch[:limit]

    def _finish(self, sampler: StepSampler, done: Sequence[SamplingJob]) -> None:
        """Decode what ended with this forward; a job never waits for samples of another."""
        samples = [sample for job in done for sample in job.samples]
        limit = min(self._max_batch, sampler.max_batch(done[0].size))
        chunks = [sampler.decode(samples[start : start + limit]) for start in range(0, len(samples), limit)]
        self._remove(done)
        for job, images in zip(done, torch.cat(chunks).split([len(job.samples) for job in done]), strict=True):
            job.ended = time.monotonic()
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(images)

    def _fail(self, jobs: Sequence[SamplingJob], error: Exception) -> None:
        self._remove(jobs)
        for job in jobs:
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _remove(self, jobs: Sequence[SamplingJob]) -> None:
        removed = set(map(id, jobs))
        with self._changed:
            self._jobs = [job for job in self._jobs if id(job) not in removed]


def _expected_s(new: SamplingJob, jobs: Sequence[SamplingJob]) -> float:
    """Estimate the seconds until a new job is done beside the others, by the turns that its client and model get.

    A client that already waits for a model must leave room for another one that comes: it gets no more than half of the seconds.
    """
    own = [job for job in jobs if job.client == new.client and job.model is new.model]
    clients = {new.client, *(job.client for job in jobs)}
    models = {id(job.model) for job in [new, *jobs] if job.client == new.client}
    shares = max(len(clients) * len(models), 2 if own else 1)
    expected_s = shares * sum(job.remaining_s for job in [new, *own])
    return max(expected_s, sum(job.remaining_s for job in [new, *jobs])) if own else expected_s
