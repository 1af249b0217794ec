"""The Weights & Biases run that belongs to a run folder. The library is imported when one is opened."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

from flashdmd_ray.run.destinations import LeftOut
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.messages import typed_line
from flashdmd_ray.run.settings import flatten


class WandbRun:
    """The run named in the folder's `wandb.json`, else a new one. Where and whether it is sent, the variables WANDB_* say."""

    def __init__(self, folder: Path, project: str) -> None:
        """project: its name, or 'team/name'."""
        import wandb
        import yaml

        self._folder = folder
        self._file = folder / "wandb.json"
        self._sent: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "step": -1, "images": []}
        if self._file.is_file():
            self._sent |= json.loads(self._file.read_text())
        team, _, name = project.rpartition("/")
        self._run = wandb.init(
            entity=team or None,
            project=name,
            id=self._sent["id"],
            name=folder.name,
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        config = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        self._run.config.update(config, allow_val_change=True)
        # Records and images of one step come at different times, and W&B's own step only grows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._save()

    def log_metrics(self, records: list[tuple[int, dict[str, Any]]]) -> None:
        for _, record in records:
            if record["step"] > self._sent["step"]:
                self._run.log({key: math.nan if value is None else value for key, value in record.items()})
                self._sent["step"] = record["step"]
        self._save()

    def log_image(self, key: str, path: str, step: int) -> None:
        import wandb

        if [key, step] in self._sent["images"]:
            return
        try:
            image = wandb.Image(str(self._folder / path), caption=f"step {step}")
        except OSError as error:
            raise LeftOut(typed_line(error)) from error
        self._run.log({key: image, "step": step})
        self._sent["images"].append([key, step])
        self._save()

    def tag(self, key: str, text: str) -> None:
        self._run.summary[key] = text

    def log_file(self, path: str) -> None:
        if not (self._folder / path).is_file():
            raise LeftOut(f"{self._folder / path} is not there")
        self._run.save(str(self._folder / path), base_path=str(self._folder), policy="now")

    def log_model(self, export: str) -> None:
        """Do nothing: gigabytes go to somebody else's machines when the user sends them (`wandb artifact put`)."""

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)

    def refuses(self, error: Exception) -> bool:
        return False

    def _save(self) -> None:
        write_atomically(self._file, json.dumps(self._sent) + "\n")
