"""One function on several ranks under Ray Train: placement, process group, checkpoints, and recovery after a worker was lost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from flashdmd_ray.engine.processes import free_port, init_process_group
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.run.variables import prepare_environment, ray_address
from flashdmd_ray.runtime.cluster import Cluster
from flashdmd_ray.runtime.environment import worker_environment
from flashdmd_ray.runtime.errors import WorkerLost

STOP, REFUSED = "stop", "refused.json"
_REFUSALS = {"ValueError": ValueError, "FloatingPointError": FloatingPointError}


@dataclass(frozen=True)
class TrainSettings:
    """Placement and limits of the ranks.

    storage: a folder that every machine of the cluster sees; Ray Train keeps checkpoints in its folder `checkpoints`. workers: ranks,
    with so many Ray CPUs and GPUs each. start_s, collective_s: deadlines in seconds. attempts: starts in all. keep: checkpoints that
    stay.
    """

    storage: Path
    workers: int
    cpus: float
    gpus: float
    threads: int
    start_s: float
    collective_s: float
    attempts: int
    keep: int


class RayTrainContext:
    """`reward_training.training.TrainContext` of a rank under Ray Train."""

    def __init__(self, storage: Path) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._stop = storage / STOP

    def newest_checkpoint(self) -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.path)

    def save_checkpoint(self, step: int, metrics: dict[str, float], write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="flashdmd-") as folder:
            write(Path(folder))
            made = Checkpoint.from_directory(folder) if self.rank == 0 else None
            ray.train.report({"step": step, **metrics}, checkpoint=made, checkpoint_dir_name=f"step-{step:08}")

    def is_stopping(self) -> bool:
        """Return True when a stop was requested. Rank 0 looks and tells the others, so that all leave after the same step."""
        requested = torch.tensor(int(self.rank == 0 and self._stop.exists()))
        if self.world_size > 1:
            requested = requested.cuda() if torch.distributed.get_backend() == "nccl" else requested
            torch.distributed.broadcast(requested, src=0)
        return bool(requested)


@contextmanager
def ray_train(settings: TrainSettings) -> Iterator[Callable[[Callable[[RayTrainContext], None]], None]]:
    """Connect to Ray, in the main thread, and give `run(work)`, which blocks and may be called in any thread.

    run calls `work` on every rank, and again, from the newest checkpoint, after a rank was lost; an earlier job with the same storage is
    gone on with. It raises what `work` raised when that was ValueError or FloatingPointError, and WorkerLost when ranks were lost more
    often than `attempts` allows.
    """
    for name in (STOP, REFUSED):
        (settings.storage / name).unlink(missing_ok=True)
    _prepare_environment(settings)
    cluster = Cluster.join()
    try:
        yield partial(_run, settings)
    finally:
        cluster.leave()


def _run(settings: TrainSettings, work: Callable[[RayTrainContext], None]) -> None:
    try:
        _trainer(work, settings).fit()
    except ray.train.TrainingFailedError as error:
        raise WorkerLost(
            f"training: a worker was lost {settings.attempts} times ({_reason(error)}). Most often the system ended it for want of memory: "
            "see its log; use fewer workers or a smaller batch"
        ) from None
    refused = settings.storage / REFUSED
    if refused.is_file():
        said = json.loads(refused.read_text())
        raise _REFUSALS[said["kind"]](said["text"])


def request_stop(storage: Path) -> None:
    """Ask the ranks to finish their step, write a checkpoint and leave."""
    (storage / STOP).touch()


def _prepare_environment(settings: TrainSettings) -> None:
    """Set what Ray Train reads from the environment of the process that calls it."""
    os.environ.setdefault(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2"
    )  # every report waits for the next look at the workers
    if ray_address(os.environ) is None:  # nobody takes away the machine of a private Ray: no process to watch for it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(settings.start_s))
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(settings.collective_s))
    os.environ.setdefault(
        "RAY_CHDIR_TO_TRIAL_DIR", "0"
    )  # else relative paths of a configuration would mean something else


def _trainer(work: Callable[[RayTrainContext], None], settings: TrainSettings) -> TorchTrainer:
    resources = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
    return _Trainer(
        _on_rank,
        train_loop_config={"work": work, "storage": settings.storage},
        torch_config=_Group(timeout_s=int(settings.collective_s)),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=bool(settings.gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(settings.storage.absolute()),
            failure_config=FailureConfig(max_failures=settings.attempts - 1),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep),
            worker_runtime_env={"env_vars": worker_environment(settings.threads, settings.gpus)},
        ),
    )


class _Trainer(TorchTrainer):
    """A trainer without two processes of Ray Train's: one for data sets, which are not used, and one that frees what a dead job holds.

    A private Ray ends with its job, so only a shared one gets the second; without a dashboard it would warn every second. The method is a
    private one of Ray: should it go, both are started again.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = ["DatasetsCallback"]
        if ray_address(os.environ) is None:
            unused.append("PlacementGroupCleanerCallback")
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in unused]


def _on_rank(config: dict[str, Any]) -> None:
    """Run the work on this rank. A ValueError or FloatingPointError is written down: starting again would not mend it."""
    prepare_environment(os.environ)
    context = RayTrainContext(config["storage"])
    try:
        config["work"](context)
    except (ValueError, FloatingPointError) as error:
        kind = next(name for name, refusal in _REFUSALS.items() if isinstance(error, refusal))
        (config["storage"] / REFUSED).write_text(json.dumps({"kind": kind, "text": str(error)}))


@dataclass
class _Group(TorchConfig):
    """Process group of Ray Train's torch ranks: on the loopback address it listens there only, and each rank sees its own GPU alone."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GroupBackend


class _GroupBackend(Backend):
    share_cuda_visible_devices = False

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, _address)
        size = len(worker_group)
        # By position: the group's own parameters are called rank and fn.
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, init_process_group, rank, size, address, port, backend_config.timeout_s
                )
                for rank in range(size)
            ]
        )


def _address() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    return address, free_port(address)


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", {})
    return one_line(next(iter(failures.values()), error))
