"""Evaluate a run's student and its teacher: `python jobs/evaluate.py RUN [--samples N] [--seed S]`."""

import sys

from flashdmd_ray.commands.evaluate import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command())
