"""Seconds that this process has waited for data. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_waited = 0.0


def seconds_waited() -> float:
    """Seconds so far. Of no meaning while several threads wait."""
    return _waited


@contextmanager
def waiting_for_data() -> Iterator[None]:
    """Count the time inside."""
    global _waited
    started = time.perf_counter()
    try:
        yield
    finally:
        _waited += time.perf_counter() - started
