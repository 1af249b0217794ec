"""Measure the networks of configurations on the meta device and keep what they cost in flashdmd_ray/plan/costs.json.

    python benchmarks/plan_costs.py [CONFIG ...]       # default: every preset of training, and all that `flashdmd config new` may write

What is in the table already is left alone; remove an entry to have it measured again. About a minute for a network of SDXL's size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice, product

from flashdmd_ray.config import PRESETS, Config, load_config
from flashdmd_ray.plan.costs import TABLE
from flashdmd_ray.plan.measure import measure
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.specs import all_of, key_of
from flashdmd_ray.reference.start import SAM, USUAL, ladder


def shipped() -> Iterator[tuple[str, Config]]:
    """Name and configuration of each preset, and of each file that `flashdmd config new` may write for a published teacher."""
    for name in PRESETS:
        if not name.startswith("latent_reward"):
            yield name, load_config(name)
    for gpus, family, sam in product((1, 0), USUAL, (None, SAM)):
        options = argparse.Namespace(
            family=family, sam=sam, images="images", prompts=None, teacher=None, teacher_config=None
        )
        for _, config, models in islice(ladder(options, family, gpus, 24.0), None if gpus else 1):
            seen = (
                f"{' x '.join(map(str, models.image or ()))} pixels, batch {config.batch}, {'SAM' if sam else 'no SAM'}"
            )
            yield f"config new {family}, {'GPU' if gpus else 'CPU'}, {seen}", config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", metavar="CONFIG", nargs="*")
    names = parser.parse_args().configs
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for name, config in [(name, load_config(name)) for name in names] or shipped():
        for spec in all_of(config, models_of(config)):
            key = key_of(spec)
            if key in table:
                continue
            started = time.perf_counter()
            table[key] = {"spec": spec, "cost": measure(spec)}
            print(f"{name}: {spec['kind']} {key}, {time.perf_counter() - started:.0f} s", flush=True)
            lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items())
            TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
