"""The service against a plain loop over diffusers, on the same cores in one run.

    python benchmarks/serve_throughput.py [--rounds 5] [--seconds 6] [--images 1] [--export DIRECTORY]

Three figures: images per second of a saturated service over those of the loop at its best batch size (both with PNG encoding; the
service's clients run on the same cores), the median latency of single requests over that of the loop at batch one, on all cores and on
the threads that a replica has, and what becomes of twice as many requests as the service can draw. Machines are noisy: loop and service
take turns, and the first two figures are medians over the rounds, of figures of one round each. The bars are printed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_load import Answer, ask, client, export_demo, keep_asking, median, percentile, running_service

PROMPT = "a red {} left of a green {} on a gray background"
BATCHES = (1, 4, 8, 16, 32, 64)
QUEUE = 128


def prompt(number: int) -> str:
    """One of many different prompts, as users would send."""
    return PROMPT.format(number % 10, number // 10 % 10)


class Loop:
    """Plain loop over a stock pipeline, in this process."""

    def __init__(self, export: Path) -> None:
        from diffusers import StableDiffusionXLPipeline

        self._pipeline = StableDiffusionXLPipeline.from_pretrained(export, use_safetensors=True)
        self._pipeline.set_progress_bar_config(disable=True)
        self._call = json.loads((export / "flashdmd.json").read_text())["call"]

    def seconds_per_image(self, batch: int, threads: int, seconds: float) -> float:
        """Median over repetitions for `seconds`, at least two after a first one that does not count."""
        import torch

        torch.set_num_threads(threads)
        rounds: list[float] = []
        began = time.monotonic()
        while len(rounds) < 3 or time.monotonic() - began < seconds:
            start, number = time.monotonic(), len(rounds) * batch
            generators = [torch.Generator().manual_seed(number + i) for i in range(batch)]
            prompts = [prompt(number + i) for i in range(batch)]
            for image in self._pipeline(prompts, generator=generators, **self._call).images:
                image.save(io.BytesIO(), "PNG")
            rounds.append((time.monotonic() - start) / batch)
        return median(rounds[1:])


@dataclass(frozen=True)
class Round:
    """Seconds of one round. rate: images per second; best: the loop, per image at its best batch size; narrow: on a replica's threads."""

    best: float
    alone: float
    narrow: float
    rate: float
    latency: float
    drawing: float

    @property
    def ratio(self) -> float:
        return self.rate * self.best


async def single(url: str, seconds: float) -> list[Answer]:
    answers = await keep_asking(url, 1, lambda _, passed: passed > seconds, lambda i: {"prompt": prompt(i), "seed": i})
    return answers[2:]


async def saturated(url: str, seconds: float, clients: int, images: int = 1) -> float:
    """Requests per second, without the first and last tenth."""
    answers = await keep_asking(
        url, clients, lambda _, passed: passed > seconds, lambda i: {"prompt": prompt(i), "seed": i, "n": images}
    )
    assert all(answer.status == 200 for answer in answers), Counter(answer.status for answer in answers)
    ends = sorted(answer.sent + answer.seconds for answer in answers)
    first, last = len(ends) // 10, 9 * len(ends) // 10
    return (last - first) / (ends[last] - ends[first])


async def overloaded(url: str, rate: float, seconds: float) -> list[Answer]:
    """Send `rate` requests per second, on time whatever became of those before."""
    async with client() as session:
        tasks, began = [], time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            while len(tasks) < rate * passed:
                number = len(tasks)
                tasks.append(asyncio.create_task(ask(session, url, {"prompt": prompt(number), "seed": number})))
            await asyncio.sleep(0.01)
        return list(await asyncio.gather(*tasks))


def report_overload(answers: Sequence[Answer], capacity: float) -> None:
    counts = Counter(answer.status for answer in answers)
    admitted = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    bound = QUEUE / capacity
    print(f"twice the load: {dict(counts)} (bar: 200 and 429 only)")
    print(
        f"  admitted: median {median(admitted):.2f} s, p95 {percentile(admitted, 0.95):.2f} s; a full queue takes {bound:.2f} s"
    )
    if refused:
        print(f"  refused: p95 {percentile(refused, 0.95):.3f} s")


def take_turns(loop: Loop, url: str, options: argparse.Namespace, best: int, threads: tuple[int, int]) -> Round:
    """Measure one round. threads: those of the loop and of a replica."""
    cores, narrow = threads
    clients = QUEUE // options.images
    rate = options.images * asyncio.run(saturated(url, options.seconds, clients, options.images))
    at_best = loop.seconds_per_image(best, cores, options.seconds)
    alone = asyncio.run(single(url, options.seconds))
    return Round(
        best=at_best,
        alone=loop.seconds_per_image(1, cores, options.seconds / 2),
        narrow=loop.seconds_per_image(1, narrow, options.seconds / 2),
        rate=rate,
        latency=median([answer.seconds for answer in alone]),
        drawing=median([answer.body["timing"]["draw_seconds"] for answer in alone]),
    )


def report(rounds: Sequence[Round], images: int, best: int, threads: tuple[int, int]) -> None:
    rate, at_best = median([r.rate for r in rounds]), median([r.best for r in rounds])
    print(
        f"saturated by requests for {images}: {rate:.1f} images/s, the loop at batch {best} {1 / at_best:.1f} images/s;",
        end=" ",
    )
    ratios = sorted(r.ratio for r in rounds)
    print(f"ratio {median(ratios):.2f}, of {', '.join(f'{ratio:.2f}' for ratio in ratios)} (bar: at least 0.9)")
    latency, drawing = median([r.latency for r in rounds]), median([r.drawing for r in rounds])
    print(f"single request: {1000 * latency:.1f} ms, of which its own drawing {1000 * drawing:.1f} ms")
    for count, own in zip(threads, ([r.alone for r in rounds], [r.narrow for r in rounds]), strict=True):
        more = sorted(1000 * (r.latency - seconds) for r, seconds in zip(rounds, own, strict=True))
        said = ", ".join(f"{ms:+.1f}" for ms in more)
        print(
            f"  the loop on {count} threads: {1000 * median(own):.1f} ms, so {median(more):+.1f} ms, of {said} (bar: 15)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="of each saturating request (default: %(default)s)")
    parser.add_argument("--export", type=Path, help="a pipeline export (default: one of the demo's teacher, made now)")
    parser.add_argument("--replicas", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    threads = (cores, max(1, cores // options.replicas))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        export = options.export or export_demo(root / "demo")
        args = {
            "models": {"demo": str(export)},
            "teachers": False,
            "cache": str(root / "cache"),
            "queue": QUEUE,
            "replica": {"count": options.replicas, "batch": options.batch, "threads": threads[1]},
        }
        loop = Loop(export)
        per_image = {batch: loop.seconds_per_image(batch, cores, 4.0) for batch in BATCHES}
        best = min(per_image, key=lambda batch: per_image[batch])
        print("plain loop, ms per image: " + ", ".join(f"batch {b} {1000 * s:.1f}" for b, s in per_image.items()))
        with running_service(args) as service:
            asyncio.run(saturated(service.url, 3, 8))  # warm
            rounds = [take_turns(loop, service.url, options, best, threads) for _ in range(options.rounds)]
            report(rounds, options.images, best, threads)
            rate = median([r.rate for r in rounds])
            report_overload(asyncio.run(overloaded(service.url, 2 * rate, 3 * options.seconds)), rate)


if __name__ == "__main__":
    main()
