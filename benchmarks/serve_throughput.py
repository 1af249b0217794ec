"""The service against a plain loop over diffusers, on the same cores in one run.

    python benchmarks/serve_throughput.py [--seconds 20] [--images 1] [--export DIRECTORY]

Three figures: images per second of a saturated service over those of the loop at its best batch size (both with PNG encoding; the
service's clients run on the same cores), the median latency of single requests over that of the loop at batch one, on all cores and on
the threads that a replica has, and what becomes of twice as many requests as the service can draw. The bars are printed beside.
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
from pathlib import Path

from serve_load import Answer, ask, client, export_demo, keep_asking, median, percentile, running_service

PROMPT = "a red {} left of a green {} on a gray background"
BATCHES = (1, 4, 8, 16, 32)
QUEUE = 64


def prompt(number: int) -> str:
    """Many different ones, as users ask."""
    return PROMPT.format(number % 10, number // 10 % 10)


def loop(export: Path, seconds: float, threads: int, batches: Sequence[int]) -> dict[int, float]:
    """Seconds per image of the plain loop, by batch size."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    torch.set_num_threads(threads)
    pipeline = StableDiffusionXLPipeline.from_pretrained(export, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((export / "flashdmd.json").read_text())["call"]
    found = {}
    for batch in batches:
        rounds = []
        began = time.monotonic()
        while not rounds or time.monotonic() - began < seconds / len(batches):
            start, number = time.monotonic(), len(rounds) * batch
            generators = [torch.Generator().manual_seed(number + i) for i in range(batch)]
            prompts = [prompt(number + i) for i in range(batch)]
            for image in pipeline(prompts, generator=generators, **call).images:
                image.save(io.BytesIO(), "PNG")
            rounds.append((time.monotonic() - start) / batch)
        found[batch] = median(rounds[1:] or rounds)
    return found


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
    """`rate` requests per second, sent on time whatever becomes of those before."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="of each saturating request (default: %(default)s)")
    parser.add_argument("--export", type=Path, help="a pipeline export (default: one of the demo's teacher, made now)")
    parser.add_argument("--replicas", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    threads = max(1, cores // options.replicas)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        export = options.export or export_demo(root / "demo")
        args = {
            "models": {"demo": str(export)},
            "teachers": False,
            "cache": str(root / "cache"),
            "queue": QUEUE,
            "replica": {"count": options.replicas, "batch": options.batch, "threads": threads},
        }
        per_image = loop(export, options.seconds, cores, BATCHES)
        like_for_like = loop(export, options.seconds / len(BATCHES), threads, (1,))[1]
        best = min(per_image, key=lambda batch: per_image[batch])
        print("plain loop, ms per image: " + ", ".join(f"batch {b} {1000 * s:.1f}" for b, s in per_image.items()))
        with running_service(args) as url:
            asyncio.run(saturated(url, 3, 8))  # warm
            alone = asyncio.run(single(url, options.seconds))
            latency = median([answer.seconds for answer in alone])
            drawing = median([answer.body["timing"]["draw_seconds"] for answer in alone])
            clients = max(1, min(QUEUE, 2 * options.batch) // options.images)
            rate = options.images * asyncio.run(saturated(url, options.seconds, clients, options.images))
            crowd = asyncio.run(overloaded(url, 2 * rate, options.seconds))
        print(f"saturated by requests for {options.images}: {rate:.1f} images/s, the loop at batch {best}", end=" ")
        print(f"{1 / per_image[best]:.1f} images/s: ratio {rate * per_image[best]:.2f} (bar: at least 0.9)")
        print(f"single request: median {1000 * latency:.1f} ms, of which its own drawing {1000 * drawing:.1f} ms")
        for what, own in ((f"on {cores} threads", per_image[1]), (f"on {threads}, as a replica", like_for_like)):
            print(f"  the loop {what}: {1000 * own:.1f} ms, so {1000 * (latency - own):+.1f} ms (bar: 15)")
        report_overload(crowd, rate)


if __name__ == "__main__":
    main()
