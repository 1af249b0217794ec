"""The models of one replica: each name has one loaded version, and a new version takes its place once it is warmed up."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from flashdmd_ray.run.messages import one_line
from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.model_loading import ModelLoader, ModelVersion
from flashdmd_ray.serving.model_sources import open_source
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.version_cache import CachedVersion, VersionCache

log = logging.getLogger(LOGGER)

RETRY_S = 300.0
"""Seconds after which a refused version is tried again: what was in its way may be gone (a full disk, a silent store)."""


@dataclass(frozen=True)
class _Refusal:
    """A version that is not served: its signature ('' when the source had none), and why."""

    signature: str
    reason: str
    since: float


@dataclass
class _Slot:
    """One name of the settings, with the version that is served under it."""

    cache: VersionCache
    source: str
    version: ModelVersion | None = None
    signature: str = ""
    refused: _Refusal | None = None


class LoadedModels:
    """Registry of loaded versions. Any thread may read; one thread at a time refreshes."""

    def __init__(self, settings: ServeSettings, warm_up: Callable[[ModelVersion], None]) -> None:
        """warm_up: generates with a version before it is served; raises ValueError when it cannot."""
        self._settings = settings
        self._warm_up = warm_up
        self._loader = ModelLoader(settings)
        self._slots = {
            name: _Slot(VersionCache(settings.cache, name, source), source) for name, source in settings.models.items()
        }
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watching", daemon=True)

    def load_all(self) -> None:
        """Load every name: its source's version now, else the last that was served. Raises ValueError when there is neither."""
        for name, slot in self._slots.items():
            self.refresh(name)
            if slot.version is None:
                self._fall_back(name, slot)
        if self._settings.watch_s is not None:
            self._watcher.start()

    def close(self) -> None:
        """Stop watching the sources."""
        self._stop.set()

    def find(self, model: str) -> tuple[ModelVersion, ModelInfo] | None:
        """Return the version that generates for a model's name, and what it can do."""
        for slot in self._slots.values():
            if slot.version is not None and model in slot.version.infos:
                return slot.version, slot.version.infos[model]
        return None

    def infos(self) -> list[ModelInfo]:
        """List all models, in the order of the settings."""
        infos = []
        for slot in self._slots.values():
            if slot.version is not None:
                reason = None if slot.refused is None else slot.refused.reason
                infos += [dataclasses.replace(info, refused=reason) for info in slot.version.infos.values()]
        return infos

    def refresh(self, name: str) -> None:
        """Look at a name's source. A new version that loads and warms up takes the old one's place; another is refused."""
        slot = self._slots[name]
        signature = ""
        try:
            source = open_source(slot.source, self._settings.registry)
            signature = source.signature()
            if signature == slot.signature or _is_settled(slot.refused, signature):
                return
            self._serve(name, slot, slot.cache.fetch(source, self._settings.fetch_s))
            slot.refused = None
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            defect = not isinstance(error, ValueError | OSError)  # an OSError is a full or broken disk
            reason = slot.cache.name_source(type(error).__name__ if defect else one_line(error, 600))
            if slot.refused is None or slot.refused.reason != reason:
                log.warning("model %s: its new version is refused: %s", name, reason, exc_info=defect)
            slot.refused = _Refusal(signature, reason, time.monotonic())

    def _serve(self, name: str, slot: _Slot, cached: CachedVersion) -> None:
        if slot.version is not None and slot.version.version == cached.version:
            slot.signature = cached.signature  # the same content again
            return
        began = time.monotonic()
        version = self._loader.load(name, cached.folder)
        self._warm_up(version)
        slot.version, slot.signature = version, cached.signature
        try:
            slot.cache.mark_served(cached, self._settings.fetch_s)
        except (OSError, ValueError) as error:  # it is served all the same
            log.warning("model %s: the cache does not remember its version: %s", name, one_line(error))
        log.info("model %s: version %s is served, ready after %.1f s", name, version.version, time.monotonic() - began)

    def _fall_back(self, name: str, slot: _Slot) -> None:
        assert slot.refused is not None, "a refresh serves or refuses"
        cached = slot.cache.last_served()
        if cached is None:
            raise ValueError(f"model {name}: {slot.refused.reason}")
        log.warning("model %s: the last version that was served goes on, %s", name, cached.version)
        self._serve(name, slot, cached)

    def _watch(self) -> None:
        while not self._stop.wait(self._settings.watch_s):
            for name in self._slots:
                self.refresh(name)


def _is_settled(refused: _Refusal | None, signature: str) -> bool:
    """Tell whether that version was refused less than RETRY_S ago."""
    return refused is not None and refused.signature == signature and time.monotonic() - refused.since < RETRY_S
