"""Swap two versions of a model under load, many times.

    python benchmarks/serve_swap.py [--swaps 20]

Bars: no failed request, and every answer names one of the two versions and holds the image that this version draws.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

from serve_load import Answer, export_demo, keep_asking, percentile, running_service

LONGEST_S = 120.0


class Swapper(threading.Thread):
    """Thread that swaps the export for its other version, waits until every replica serves it, and starts again."""

    def __init__(self, root: Path, swaps: int, seen: list[Answer]) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._swaps = swaps
        self._seen = seen
        self.seconds: list[float] = []
        self.failure: Exception | None = None
        self.finished = threading.Event()

    def run(self) -> None:
        try:
            for number in range(self._swaps):
                self._swap(self._root / "ba"[number % 2])
        except Exception as error:
            self.failure = error
        self.finished.set()

    def _swap(self, export: Path) -> None:
        live, new, old = (self._root / name for name in ("live", "new", "old"))
        before, began = self._newest(), time.monotonic()
        shutil.copytree(export, new)
        live.rename(old)
        new.rename(live)
        shutil.rmtree(old)
        while any(version == before for version in self._recent()) or not self._recent():
            if time.monotonic() - began > LONGEST_S:
                raise TimeoutError(f"no swap within {LONGEST_S:g} s")
            time.sleep(0.1)
        self.seconds.append(time.monotonic() - began)

    def _newest(self) -> str:
        while not self._recent():
            time.sleep(0.1)
        return self._recent()[-1]

    def _recent(self) -> list[str]:
        """Versions of the last answers, which most likely cover both replicas."""
        return [answer.body["version"] for answer in self._seen[-20:] if answer.status == 200]


def report(answers: list[Answer], swapper: Swapper) -> None:
    counts = Counter(answer.status for answer in answers)
    print(f"{len(answers)} requests over {len(swapper.seconds)} swaps: {dict(counts)} (bar: 200 only)")
    images = defaultdict(set)
    for answer in answers:
        if answer.status == 200:
            images[answer.body["version"]].add(answer.body["data"][0]["b64_json"])
    print(
        f"versions: { ({version: len(found) for version, found in images.items()}) } different images each (bar: 2 versions, 1 image)"
    )
    print(f"seconds from the new export to no more answers of the old: longest {max(swapper.seconds):.1f}")
    print(
        f"latency: p50 {percentile([a.seconds for a in answers], 0.5):.2f} s, longest {max(a.seconds for a in answers):.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        export_demo(root / "a")
        export_demo(root / "b", change=1.001)
        shutil.copytree(root / "a", root / "live")
        args = {
            "models": {"demo": str(root / "live")},
            "cache": str(root / "cache"),
            "watch_s": 0.5,
            "replica": {"count": 2, "batch": 16, "threads": 1},
        }
        with running_service(args) as service:
            asyncio.run(swap_under_load(service.url, root, options.swaps))


async def swap_under_load(url: str, root: Path, swaps: int) -> None:
    urllib.request.urlopen(f"{url}/healthz", timeout=60).read()
    answers: list[Answer] = []
    swapper = Swapper(root, swaps, answers)
    swapper.start()
    body = {"prompt": "a red 4 on a gray background", "seed": 1}
    await keep_asking(url, 4, lambda *_: swapper.finished.is_set(), lambda _: body, answers)
    if swapper.failure is not None:
        raise swapper.failure
    report(answers, swapper)


if __name__ == "__main__":
    main()
