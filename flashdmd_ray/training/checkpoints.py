"""Checkpoints of a run: when one is due, what goes into it, and the one that a resumed run starts from."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import (
    Best,
    DamagedCheckpoint,
    newest_whole,
    open_store,
    pass_over,
    read_state,
    verify_checkpoint,
)
from flashdmd_ray.config import Config
from flashdmd_ray.monitor import SEVERITY, HackMonitor
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.settings import SECOND_STAGE, changed_settings, fixed_settings, without
from flashdmd_ray.run.storage import Location, checkpoint_root
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.training.checkpoint_saver import CheckpointError, CheckpointSaver, Retries
from flashdmd_ray.training.data_report import note_replaced
from flashdmd_ray.training.observer import Observer

log = logging.getLogger(__name__)


class Checkpoints(Observer):
    """Saves every role and the other observers' state every `checkpoint.every` steps, after the last one, and before a stop.

    Nothing is saved of a run that the hack monitor stops: its weights are those of a hacked reward.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        runtime: Runtime,
        others: Sequence[Observer],
        monitor: HackMonitor,
        stop: Interruption,
    ) -> None:
        self._config = config
        self._directory = directory
        self._runtime = runtime
        self._others = others
        self._monitor = monitor
        self._stop = stop
        self._root = checkpoint_root(config, directory.path)
        self._settings = fixed_settings(Config, config.model_dump(mode="json"), ("checkpoint",))
        self._values: list[float] = []  # of checkpoint.best_metric since the last checkpoint
        self._retries = Retries(config.deadlines.checkpoint_s)
        self.saver = CheckpointSaver(
            open_store(self._root, self._run_mark(), config.checkpoint.keep, Best.from_config(config.checkpoint)),
            (runtime.generator, runtime.score, runtime.discriminator),
            config.checkpoint.asynchronous,
            config.deadlines.checkpoint_s,
        )

    def restore(self) -> Mapping[str, Any]:
        """Load every role from the newest whole checkpoint and return its state; {} when there is none.

        A damaged one is passed over and said, unless `checkpoint.on_damage` refuses it. Raises ValueError then, and when it is of another
        run or not seen by every machine.
        """
        while (checkpoint := newest_whole(self._root, self._config.checkpoint.on_damage)) is not None:
            state = read_state(checkpoint)
            self._check_same_run(checkpoint, state)
            try:
                for role in self.saver.roles:
                    role.load(checkpoint)
                return state
            except DamagedCheckpoint as error:
                if isinstance(checkpoint, Path):
                    verify_checkpoint(checkpoint)
                    raise ValueError(
                        f"{error}, but where the job was started {checkpoint} is whole: "
                        "all machines of a job must see the same storage; set checkpoint.dir to a shared folder or a URL"
                    ) from None
                pass_over(self._root, checkpoint, error, self._config.checkpoint.on_damage)
        return {}

    def _check_same_run(self, checkpoint: Location, state: Mapping[str, Any]) -> None:
        unused = () if state["counters"]["preference_updates"] else SECOND_STAGE
        saved, new = (without(settings, unused) for settings in (state.get("settings", self._settings), self._settings))
        if changes := changed_settings(saved, new):
            raise ValueError(
                f"checkpoint {checkpoint} was written with another configuration ({changes}); "
                "choose another run.name, or restore the value to resume"
            )
        preference = self._config.preference
        if unused and preference.updates and preference.start_step < state["step"]:
            raise ValueError(
                f"preference.start_step: this run has made {state['step']} steps without preference updates, and the reference policy is "
                f"frozen at the first of them; set it to {state['step']} or later"
            )

    def before_step(self, step: int) -> None:
        """Notice a checkpoint that has failed meanwhile. Raises CheckpointError when that has gone on for too long."""
        self._hear(self.saver.check)

    def after_step(self, done: int, metrics: Metrics) -> None:
        self._values.append(metrics.get(self._config.checkpoint.best_metric or "", math.nan))
        last = done == self._config.steps or self._stop.requested
        due = last or done % self._config.checkpoint.every == 0 or self._retries.is_due
        if not due or self._monitor.wants_stop:
            return
        self._hear(self.saver.wait)
        if last:
            self._save(done)
        else:
            self._hear(lambda: self._save(done))

    def _hear(self, look: Callable[[], None]) -> None:
        try:
            look()
        except (CheckpointError, OSError) as error:
            self._retries.plan(error, self.saver.newest)

    def _save(self, done: int) -> None:
        note_replaced(self._directory.path, self._runtime.discriminator.data_report())
        state: dict[str, Any] = {"step": done, "settings": self._settings}
        for observer in self._others:
            state |= observer.state()
        severity = {SEVERITY: float(self._monitor.verdict.severity)} if self._config.monitor_enabled else {}
        self.saver.save(done, state, self._mean_metric() | severity)

    def _mean_metric(self) -> dict[str, float]:
        """`checkpoint.best_metric` over the steps since the last checkpoint; warns when none of them had it."""
        name, values = self._config.checkpoint.best_metric, [value for value in self._values if math.isfinite(value)]
        self._values = []
        if name is None:
            return {}
        if not values:
            log.warning("checkpoint.best_metric: no step since the last checkpoint has a finite '%s'", name)
            return {}
        return {name: math.fsum(values) / len(values)}

    def _run_mark(self) -> str:
        """Tells this run's checkpoints from those of another run in the same place."""
        facts = json.dumps([self._config.run.name, without(self._settings, SECOND_STAGE)], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:12]
