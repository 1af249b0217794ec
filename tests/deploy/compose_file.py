"""docker-compose.yml as `docker compose config` resolves it; a fault in it fails with that command's own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMPOSE = Path(sys.executable).with_name("docker-compose")


def read(*more_files: str, **environment: str) -> dict[str, Any]:
    """The whole file, services with a profile too, with the variables of `environment` alone."""
    files = [word for name in ("docker-compose.yml", *more_files) for word in ("--file", name)]
    done = subprocess.run(
        [COMPOSE, *files, "--profile", "*", "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "COMPOSE_DISABLE_ENV_FILE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    content: dict[str, Any] = json.loads(done.stdout)
    return content
