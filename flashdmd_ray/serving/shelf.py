"""The models of one replica: each name has one loaded version, and a new one takes its place when it has proved that it draws."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from flashdmd_ray.run.messages import one_line
from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.catalogue import Loader, Version
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.snapshots import Snapshot, SnapshotStore
from flashdmd_ray.serving.sources import open_source

log = logging.getLogger(LOGGER)

Rehearse = Callable[[Version], None]
"""Draws something with a version before anyone else may; raises ValueError when it cannot."""


AGAIN_S = 300.0
"""A refused version is tried again so much later: what was in its way may be gone (a full disk, a silent store)."""


@dataclass(frozen=True)
class _Refusal:
    """A version that is not served: its signature ('' when the source had none), and why."""

    signature: str
    reason: str
    since: float


@dataclass
class _Place:
    """One name."""

    store: SnapshotStore
    source: str
    version: Version | None = None
    signature: str = ""
    refused: _Refusal | None = None


class Shelf:
    """Reading is for any thread; one thread at a time refreshes."""

    def __init__(self, settings: ServeSettings, rehearse: Rehearse) -> None:
        self._settings = settings
        self._rehearse = rehearse
        self._loader = Loader(settings)
        self._places = {
            name: _Place(SnapshotStore(settings.cache, name, source), source)
            for name, source in settings.models.items()
        }
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watching", daemon=True)

    def fill(self) -> None:
        """Load every name: its source's version now, else the last that was served. Raises ValueError when there is neither."""
        for name, place in self._places.items():
            self.refresh(name)
            if place.version is None:
                self._fall_back(name, place)
        if self._settings.watch_s is not None:
            self._watcher.start()

    def close(self) -> None:
        self._stop.set()

    def find(self, called: str) -> tuple[Version, ModelInfo] | None:
        """The version that draws for a model's name, and what it can do."""
        for place in self._places.values():
            if place.version is not None and called in place.version.infos:
                return place.version, place.version.infos[called]
        return None

    def infos(self) -> list[ModelInfo]:
        """All models, in the order of the settings."""
        found = []
        for place in self._places.values():
            if place.version is not None:
                reason = None if place.refused is None else place.refused.reason
                found += [dataclasses.replace(info, refused=reason) for info in place.version.infos.values()]
        return found

    def refresh(self, name: str) -> None:
        """Look at a name's source. A new version that loads and draws takes the place of the old; one that does not is refused."""
        place = self._places[name]
        signature = ""
        try:
            source = open_source(place.source, self._settings.registry)
            signature = source.signature()
            if signature == place.signature or _settled(place.refused, signature):
                return
            self._serve(name, place, place.store.take(source, self._settings.fetch_s))
            place.refused = None
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            reason = one_line(error, 600) if isinstance(error, ValueError) else type(error).__name__
            reason = place.store.in_words_of_the_source(reason)
            if place.refused is None or place.refused.reason != reason:
                defect = not isinstance(error, ValueError)
                log.warning("model %s: its new version is refused: %s", name, reason, exc_info=defect)
            place.refused = _Refusal(signature, reason, time.monotonic())

    def _serve(self, name: str, place: _Place, snapshot: Snapshot) -> None:
        if place.version is not None and place.version.version == snapshot.version:
            place.signature = snapshot.signature  # the same content again
            return
        began = time.monotonic()
        version = self._loader.load(name, snapshot.folder)
        self._rehearse(version)
        place.version, place.signature = version, snapshot.signature
        place.store.mark_good(snapshot, self._settings.fetch_s)
        log.info("model %s: version %s is served, ready after %.1f s", name, version.version, time.monotonic() - began)

    def _fall_back(self, name: str, place: _Place) -> None:
        refused = place.refused
        snapshot = place.store.last_good()
        assert refused is not None, "a refresh serves or refuses"
        if snapshot is None:
            raise ValueError(f"model {name}: {refused.reason}")
        log.warning("model %s: the last version that was served goes on, %s", name, snapshot.version)
        self._serve(name, place, snapshot)

    def _watch(self) -> None:
        while not self._stop.wait(self._settings.watch_s):
            for name in self._places:
                self.refresh(name)


def _settled(refused: _Refusal | None, signature: str) -> bool:
    """Whether that version was refused a short while ago."""
    return refused is not None and refused.signature == signature and time.monotonic() - refused.since < AGAIN_S
