"""Shared memory of this machine, in which a private Ray keeps what processes hand to one another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FOLDER = Path("/dev/shm")
LEAST = 512 * 2**20
"""Bytes of the smallest object store: latents, images and the weights of a laptop-size generator."""
SHARE = 0.3
"""Part of the machine's memory that an object store may take."""


def store_bytes() -> int:
    """Bytes that the object store of a private Ray may use: half of the free shared memory, and SHARE of the machine's memory at most.

    They are taken when objects come and given back when these go.
    """
    if not FOLDER.is_dir():
        return LEAST
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(LEAST, min(shutil.disk_usage(FOLDER).free // 2, int(SHARE * memory)))
