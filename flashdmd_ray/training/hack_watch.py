"""The hack monitor beside the loop: figures for the record, news for the reader, pictures when the verdict gets worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.monitor import HackMonitor
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.training.monitor_pictures import MonitorPictures
from flashdmd_ray.training.observer import Observer, left_out_without_room


class HackWatch(Observer):
    """Shows every step's metrics to the hack monitor and tells what it found."""

    def __init__(self, config: Config, pictures: MonitorPictures, tracker: Tracker, progress: Progress) -> None:
        held_out = [reward.label for reward in config.rewards if reward.held_out]
        self.monitor = HackMonitor(config.monitor, config.optimised_rewards, held_out)
        self._start_step = config.preference.start_step if config.monitor_enabled else None
        self._pictures = pictures
        self._tracker = tracker
        self._progress = progress

    def load(self, done: int, state: Mapping[str, Any]) -> None:
        if "monitor" in state:
            self.monitor.load(state["monitor"])

    def before_step(self, step: int) -> None:
        if step == self._start_step:
            with left_out_without_room():
                self._pictures.keep_start()

    def after_step(self, done: int, metrics: Metrics) -> None:
        figures, news = self.monitor.observe(done, metrics)
        metrics |= figures
        for event in news:
            self._progress.say(f"hack monitor, step {event.step}: {event.message}")
            self._tracker.tag("hack_monitor", f"step {event.step}: {event.message}")
            if event.worse:
                with left_out_without_room():
                    self._tracker.image("hack_monitor", self._pictures.write(event.step), event.step)

    def state(self) -> dict[str, Any]:
        return {"monitor": self.monitor.state()}
