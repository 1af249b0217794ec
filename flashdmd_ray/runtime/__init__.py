"""Runtimes: the roles in this process (`local`) or in Ray actors (`ray`), behind one interface."""

from flashdmd_ray.runtime.build import build_runtime
from flashdmd_ray.runtime.errors import DeadlineExceeded, RoleFailed, WorkerError, WorkerLost
from flashdmd_ray.runtime.protocol import Runtime, Task
from flashdmd_ray.runtime.supervisor import Supervisor

__all__ = [
    "DeadlineExceeded",
    "RoleFailed",
    "Runtime",
    "Supervisor",
    "Task",
    "WorkerError",
    "WorkerLost",
    "build_runtime",
]
