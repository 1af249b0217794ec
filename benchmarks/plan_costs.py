"""Measure the networks of configurations on the meta device and keep what they cost in flashdmd_ray/plan/costs.json.

    python benchmarks/plan_costs.py [CONFIG ...]       # default: every preset of joint training

What is in the table already is left alone; remove an entry to have it measured again. About a minute for a network of SDXL's size.
"""

from __future__ import annotations

import argparse
import json
import time

from flashdmd_ray.config import PRESETS, load_config
from flashdmd_ray.plan.costs import TABLE
from flashdmd_ray.plan.measure import measure
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.specs import all_of, key_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name in PRESETS if not name.startswith("latent_reward")]
    parser.add_argument("configs", metavar="CONFIG", nargs="*", default=presets)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for name in parser.parse_args().configs:
        config = load_config(name)
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
