"""Check a data set before a run, or precompute: `python jobs/prepare_data.py SOURCE [--check] [--embeddings] [--latents] [--out DIR]`."""

import sys

from flashdmd_ray.commands.prepare_data import prepare_data_command

if __name__ == "__main__":
    sys.exit(prepare_data_command())
