"""Export a run's student: `python jobs/export.py RUN [--format pipeline|single-file|lora|kohya] [--checkpoint STEP] [--out DIRECTORY]`."""

import sys

from flashdmd_ray.commands.export import export_command

if __name__ == "__main__":
    sys.exit(export_command())
