"""Look at the pools of a running job and resize them: `python jobs/scale.py RUN [pool=workers ...]`."""

import sys

from flashdmd_ray.commands.scale import scale_command

if __name__ == "__main__":
    sys.exit(scale_command())
