"""Names shared with MLflow. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import re

REGISTERED_MODEL = "flashdmd_ray"
"""Name that every exported model is a version of."""
LONGEST_KEY = 250


def mlflow_key(name: str) -> str:
    """The name of a metric, parameter or tag as MLflow takes it; most are taken as they are.

    MLflow knows letters, digits, '/', '_', '.', '-' and spaces, reads '/' as folders, and limits the length. Another name gets '_' for
    what is not allowed, and six digits of its hash, so that two names stay two.
    """
    parts = [re.sub(r"[^\w.\- ]", "_", part) for part in name.split("/")]
    key = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if key == name and len(key) <= LONGEST_KEY:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{key[: LONGEST_KEY - 7]}.{digest}"


def mlflow_model_name(name: str) -> str:
    """The name of a logged model as MLflow takes it: without '/', ':', '.', '%' and quotes."""
    return re.sub(r"[^\w\- ]", "-", name)
