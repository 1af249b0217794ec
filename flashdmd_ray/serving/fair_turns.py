"""Fair turns of the sampling thread: clients share its seconds equally, and so do the models that one client asks for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeVar


class Turn(Protocol):
    """A job as far as its turn is concerned."""

    @property
    def client(self) -> str: ...

    @property
    def model(self) -> Hashable: ...


_T = TypeVar("_T", bound=Turn)


class FairTurns:
    """Seconds that each client, and each model of a client, has had while it had jobs.

    Whoever comes anew begins where the one who had least stands: neither favoured for its absence nor behind for its past.
    """

    def __init__(self) -> None:
        self._clients: dict[str, float] = {}
        self._models: dict[str, dict[Hashable, float]] = {}

    def first(self, jobs: Sequence[_T]) -> _T:
        """Return the job whose turn it is. jobs: all that are not done, in the order in which they came; not empty."""
        self._clients = _enter(self._clients, (job.client for job in jobs))
        self._models = {client: self._models.get(client, {}) for client in self._clients}
        client = min(jobs, key=lambda job: self._clients[job.client]).client
        own = [job for job in jobs if job.client == client]
        models = self._models[client] = _enter(self._models[client], (job.model for job in own))
        return min(own, key=lambda job: models[job.model])

    def arrange(self, group: Sequence[_T], first: _T) -> list[_T]:
        """Order jobs that may share a forward: `first`, then a job of each client in turn, older ones before younger ones."""
        rounds: dict[str, int] = {}
        ranked = []
        for job in group:
            ranked.append((job is not first, rounds.get(job.client, 0), self._clients[job.client]))
            rounds[job.client] = rounds.get(job.client, 0) + 1
        return [group[i] for i in sorted(range(len(group)), key=ranked.__getitem__)]

    def charge(self, job: Turn, seconds: float) -> None:
        """Count seconds that a job has had."""
        self._clients[job.client] += seconds
        models = self._models[job.client]
        models[job.model] = models.get(job.model, 0.0) + seconds


_K = TypeVar("_K", bound=Hashable)


def _enter(seconds: dict[_K, float], present: Iterable[_K]) -> dict[_K, float]:
    """Forget who is not present any more, and let those who are new begin at the least seconds of the others."""
    keys = set(present)
    stay = {key: s for key, s in seconds.items() if key in keys}
    start = min(stay.values(), default=0.0)
    return {key: stay.get(key, start) for key in keys}
