"""Joint training: `python jobs/joint_train.py [CONFIG] [--set key=value ...] [--dry-run]`."""

import sys

from flashdmd_ray.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
