"""Export a run's newest student as a diffusers pipeline: `python jobs/export.py RUN [--out DIRECTORY]`."""

import sys

from flashdmd_ray.finished_run import export_command

if __name__ == "__main__":
    sys.exit(export_command())
