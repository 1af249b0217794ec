"""The faults of benchmarks/chaos.py, each done to the real processes and files of a run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from chaos_watch import Watched

ROLES = ("learner", "discriminator", "rollout", "reward")
FULL_S = 8.0
"""Seconds that the disk stays full."""


class Strike:
    """One fault. at: time.monotonic() of it."""

    def __init__(self, kind: str, run: Watched, chance: random.Random) -> None:
        self.kind, self.run, self.chance = kind, run, chance
        self.at = 0.0
        self.place = run.folder.parents[1]
        self.ballast = run.folder.parent / "ballast"

    def strike(self) -> dict[str, object]:
        """Do it; returns what was done at which step."""
        step = self.run.step
        time.sleep(self.chance.random())  # anywhere in a step
        memory = psutil.Process(self.run.pid).memory_info().rss / 2**20
        self.at = time.monotonic()
        KINDS[self.kind](self)
        return {"kind": self.kind, "step": step, "driver_mib": memory}

    def relieve(self, force: bool = False) -> None:
        """Make room on a full disk again, after a while."""
        if self.ballast.exists() and (force or time.monotonic() > self.at + FULL_S):
            self.ballast.unlink()

    def signal_worker(self, role: str, number: signal.Signals) -> None:
        pids = workers(self.place, role)
        os.kill(pids[self.chance.randrange(len(pids)) if len(pids) > 1 else 0], number)

    def signal_ray(self, name: str) -> None:
        for pid, found in marked_processes(self.place).items():
            if found == name:
                os.kill(pid, signal.SIGKILL)

    def damage(self) -> None:
        """Cut, flip or remove a part of the newest checkpoint, then kill a learner, so that it is needed."""
        checkpoints = sorted((self.run.folder / "checkpoints").glob("step-*"))
        if len(checkpoints) > 1:
            victim = self.chance.choice(sorted(checkpoints[-1].iterdir()))
            data = bytearray(victim.read_bytes())
            how = self.chance.choice(["cut", "flip", "remove"])
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            victim.unlink() if how == "remove" else victim.write_bytes(
                data if how == "flip" else data[: len(data) // 2]
            )
        self.signal_worker("learner", signal.SIGKILL)

    def fill_disk(self) -> None:
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))


KINDS: Mapping[str, Callable[[Strike], None]] = {
    **{f"kill {role}": (lambda s, role=role: s.signal_worker(role, signal.SIGKILL)) for role in ROLES},
    **{f"stop {role}": (lambda s, role=role: s.signal_worker(role, signal.SIGSTOP)) for role in ROLES},
    "kill raylet": lambda s: s.signal_ray("raylet"),
    "kill Ray's server": lambda s: s.signal_ray("gcs_server"),
    "kill driver": lambda s: os.kill(s.run.pid, signal.SIGKILL),
    "SIGTERM driver": lambda s: os.kill(s.run.pid, signal.SIGTERM),
    "SIGTERM group": lambda s: os.killpg(s.run.pid, signal.SIGTERM),
    "NaN": lambda s: (s.place / "nan").touch(),
    "damage": Strike.damage,
    "full disk": Strike.fill_disk,
}


def marked_processes(place: Path) -> dict[int, str]:
    """Process id and name of all processes of the run, which carry its folder in their environment."""
    mark, found = f"FLASHDMD_CHAOS={place}\0".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found[int(process.name)] = (process / "comm").read_text().strip()
    return found


def workers(place: Path, role: str) -> list[int]:
    """The processes that hold a role: its own, or the learner's where it lives within."""
    mark, found = f"FLASHDMD_WORKER={role}-".encode(), []
    for pid in marked_processes(place):
        with suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found or (workers(place, "learner") if role != "learner" else [])
