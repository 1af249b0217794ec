"""A process that forks writers of checkpoints and lets them die. Reads one JSON order per line, answers with one JSON line.

{"root": ..., "at": n}: the writer kills itself with SIGKILL before its n-th operation on a file of the next checkpoint.
{"root": ..., "after_s": s}: the writer saves one checkpoint after the other and is killed from outside after s seconds.
{"root": ..., "largest_file": bytes}: the writer may not write larger files, as on a full disk.
The answer says which step was reported as complete last, whether the writer was killed, and what it raised.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from flashdmd_ray.checkpoint import Destination, Saved, open_store, save_part
from flashdmd_ray.run.storage import parse_location
from flashdmd_ray.training.checkpoint_saver import CheckpointSaver

WATCHED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.scandir", "os.listdir"}


class Role(Saved):
    """Two small parts that tell their step."""

    def __init__(self, numel: int = 50) -> None:
        self.weights = torch.zeros(numel)

    def save(self, directory: Destination) -> None:
        for name in ("a", "b"):
            save_part(directory / f"{name}.safetensors", {"w": self.weights.clone()})


def save(saver: CheckpointSaver, role: Role, step: int, say: int) -> None:
    role.weights.fill_(step)
    saver.save(step, {"step": step}, {})
    saver.wait()
    os.write(say, f"{step}\n".encode())


def kill_before(number: int, folder: str) -> None:
    """SIGKILL at the number-th operation below `folder`, whichever thread does it."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in WATCHED and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def write(order: dict[str, object], say: int) -> None:
    root, role = parse_location(str(order["root"])), Role()
    saver = CheckpointSaver(open_store(root, "run", keep=2), [role], asynchronous=True, deadline_s=60)
    if order.get("remote"):  # a folder used like an object store: no renames
        from flashdmd_ray.run.storage import RemotePath

        saver.store = open_store(RemotePath(f"file://{order['root']}"), "run", keep=2)
    for step in (1, 2):
        save(saver, role, step, say)
    if "at" in order:
        kill_before(int(str(order["at"])), str(order["root"]))
        save(saver, role, 3, say)
    elif "largest_file" in order:
        role.weights = torch.zeros(100_000)
        limit = int(str(order["largest_file"]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(saver, role, 3, say)
    else:
        for step in range(3, 100_000):
            save(saver, role, step, say)


def run(order: dict[str, object]) -> dict[str, object]:
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        try:
            write(order, say)
            os._exit(0)
        except Exception as error:
            os.write(say, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(say)
    with os.fdopen(hear) as lines:
        said = [lines.readline(), lines.readline()]
        if "after_s" in order:
            time.sleep(float(str(order["after_s"])))
            os.kill(child, signal.SIGKILL)
        said += list(lines)
    _, status = os.waitpid(child, 0)
    steps = [int(line) for line in said if line.strip().isdigit()]
    errors = [line.strip() for line in said if not line.strip().isdigit()]
    return {"reported": steps[-1], "killed": os.WIFSIGNALED(status), "errors": errors}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        Path(str(order["root"])).mkdir(parents=True, exist_ok=True)
        print(json.dumps(run(order)), flush=True)
