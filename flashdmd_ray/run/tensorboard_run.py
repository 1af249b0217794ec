"""TensorBoard's event files of a run folder. The library is imported when they are opened; no TensorFlow and no torch is needed."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

from flashdmd_ray.run.destinations import LeftOut
from flashdmd_ray.run.messages import typed_line


class TensorBoardRun:
    """Writes scalars, images and texts below `tensorboard/` of the run folder; a resumed run adds to what is there."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = folder
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        there = EventAccumulator(str(events), size_guidance={"scalars": 0, "images": 0}).Reload()
        kinds = (("scalars", there.Scalars), ("images", there.Images))
        self._last = {key: max(e.step for e in read(key)) for kind, read in kinds for key in there.Tags()[kind]}
        self._writer = EventFileWriter(str(events))

    def log_metrics(self, records: list[tuple[int, dict[str, Any]]]) -> None:
        for milliseconds, record in records:
            values = [
                {"tag": key, "simple_value": math.nan if value is None else value}
                for key, value in record.items()
                if key != "step" and self._is_new(key, record["step"])
            ]
            self._write(values, record["step"], milliseconds / 1000)
        self._writer.flush()

    def log_image(self, key: str, path: str, step: int) -> None:
        from PIL import Image

        if not self._is_new(key, step):
            return
        encoded = io.BytesIO()
        try:
            with Image.open(self._folder / path) as image:
                image.convert("RGB").save(encoded, "png")
        except OSError as error:
            raise LeftOut(typed_line(error)) from error
        size = {"width": image.width, "height": image.height, "colorspace": 3}
        self._write([{"tag": key, "image": {**size, "encoded_image_string": encoded.getvalue()}}], step)
        self._writer.flush()

    def tag(self, key: str, text: str) -> None:
        kind = {"plugin_data": {"plugin_name": "text"}}
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        self._write([{"tag": key, "metadata": kind, "tensor": tensor}], 0)
        self._writer.flush()

    def log_file(self, path: str) -> None:
        """Do nothing: TensorBoard keeps no files."""

    def log_model(self, export: str) -> None:
        """Do nothing: TensorBoard keeps no models."""

    def finish(self, status: str) -> None:
        self._writer.close()

    def refuses(self, error: Exception) -> bool:
        return False

    def _is_new(self, key: str, step: int) -> bool:
        new = step > self._last.get(key, -1)
        self._last[key] = max(step, self._last.get(key, -1))
        return new

    def _write(self, values: list[dict[str, Any]], step: int, seconds: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if values:
            self._writer.add_event(Event(wall_time=seconds or time.time(), step=step, summary={"value": values}))
