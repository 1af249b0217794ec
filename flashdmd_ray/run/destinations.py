"""Places that a run folder is mirrored to: what the mirror asks of each of them. Imports none of their libraries."""

from __future__ import annotations

from typing import Any, Protocol

TITLES = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
"""Name of a destination, of its log file and of its process -> what the user reads."""
URI_VARIABLE = "FLASHDMD_TRACKING_URI"
"""Environment variable in which the mirror process gets the tracking URI of MLflow."""
LEFT_OUT = "left out: "
"""Beginning of the mirror's lines about one thing that a destination refuses for good."""


class Unusable(Exception):
    """The destination answers, but not for this run until somebody does what the text says."""


class LeftOut(Exception):
    """One thing that cannot be sent, now or later: its file is not there, say."""


class Destination(Protocol):
    """One run at its destination. What fails for a reason that may pass raises, and is tried again."""

    def log_metrics(self, records: list[tuple[int, dict[str, Any]]]) -> None:
        """Log (time in ms, record of metrics.jsonl) pairs; a (key, step) that is there is not logged twice."""
        ...

    def log_image(self, key: str, path: str, step: int) -> None:
        """Log an image file of the run folder once. Raises LeftOut when it is not there any more."""
        ...

    def tag(self, key: str, text: str) -> None:
        """Set a text that describes the run."""
        ...

    def log_file(self, path: str) -> None:
        """Keep a file of the run folder, such as its HTML report. Raises LeftOut when it is not there any more."""
        ...

    def log_model(self, export: str) -> None:
        """Log an exported pipeline of the run folder, where models are kept."""
        ...

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        ...

    def refuses(self, error: Exception) -> bool:
        """Return whether an error is an answer that no later attempt changes. Raises Unusable when the run is at fault."""
        ...
