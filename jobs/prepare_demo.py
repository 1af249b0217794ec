"""Make the demo world's weights: `python jobs/prepare_demo.py [--part NAME ...]`.

All parts take about three hours of one core. Progress is saved every two minutes: the same command continues where it
stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Without these, glibc returns and re-faults every large activation: a third of the time of small training runs.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main() -> int:
    from flashdmd_ray.demo import WEIGHTS_ROOT
    from flashdmd_ray.run.command_line import path_argument, prepare_process
    from recipes.parts import PARTS, make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all, in order")
    parser.add_argument(
        "--out", type=path_argument, default=WEIGHTS_ROOT, help="where the weights go (default: the package)"
    )
    parser.add_argument(
        "--work", type=path_argument, default=Path("work/prepare_demo"), help="resumable training state"
    )
    parser.add_argument("--steps-scale", type=_positive, default=1.0, help="multiplies every training's length")
    arguments = parser.parse_args()
    prepare_process()
    try:
        for part in [name for name in PARTS if name in arguments.part]:
            metrics = make(part, arguments.out, arguments.work, arguments.steps_scale)
            print(part, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if not _MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})
    sys.exit(main())
