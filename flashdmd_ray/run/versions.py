"""Versions of the software that a result depends on. Imports nothing heavy."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "flashdmd-ray",
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "segment-anything",
    "numpy",
    "mlflow",
)


def software_versions() -> dict[str, Any]:
    """Versions of Python, the packages and the commit, by name; None for what is not there. Packages are not imported for it."""
    versions: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        versions["commit"] = None
    return versions
