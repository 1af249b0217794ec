"""The command `flashdmd doctor`: what this machine has, and what a configuration lacks here.

Exit codes: 0 nothing is wrong, 2 something is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from flashdmd_ray.config import Config, load_config
from flashdmd_ray.run.command_line import run_command
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.run.shared_memory import FOLDER as SHARED_MEMORY
from flashdmd_ray.run.variables import check_ray_address, ray_address
from flashdmd_ray.run.versions import software_versions

GIB = 2**30
EXTRAS = {
    "open_clip": "HPSv2 rewards",
    "bitsandbytes": "adamw_8bit",
    "datasets": "data of the hub",
    "torch_fidelity": "FID of flashdmd score",
    "lpips": "LPIPS of flashdmd score",
}
"""Optional package -> what it is for."""
PORTS = {8000: "flashdmd serve", 5000: "mlflow ui", 8265: "Ray's dashboard"}
"""Usual port -> who listens there."""
LEAST_SHARED = 0.5
"""GiB of shared memory below which a private Ray keeps its objects on the disk."""


def doctor_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd doctor [CONFIG]`: print what is here and what is wrong; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd doctor",
        description="Report versions, GPUs, memory, disks and accounts of this machine, and what a configuration lacks here.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a file, or a preset's name (default: the demo)")
    parser.add_argument("--set", metavar="key=value", nargs="+", action="extend", default=[], help="single settings")
    options = parser.parse_args(arguments)
    return run_command(lambda: _examine(load_config(options.config, options.set), options.config or "demo"))


def _examine(config: Config, name: str) -> int:
    faults = []
    for title, lines in (("software", software()), ("machine", machine(config)), ("accounts", accounts())):
        print(title, flush=True)
        for label, value, fault in lines:
            print(f"  {label:<18} {value}", flush=True)
            faults += [fault] if fault else []
    faults += lacking(config)
    print(f"configuration {name}\n  {'can run here' if not faults else 'cannot run as things are'}", flush=True)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return 0


Line = tuple[str, str, str]
"""A label, what is there, and a fault with its remedy or ''."""


def software() -> Iterator[Line]:
    """Versions of packages, and optional ones."""
    for name, version in software_versions().items():
        yield name, str(version or "-"), ""
    for package, purpose in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        yield package, f"{'installed' if there else 'not installed'} ({purpose})", ""


def machine(config: Config) -> Iterator[Line]:
    """Processors, memory, GPUs, disks and ports."""
    memory = psutil.virtual_memory()
    yield "CPU cores", str(psutil.cpu_count()), ""
    yield "memory", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} free", ""
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free / GIB
        small = (
            f"{SHARED_MEMORY}: {free:.2g} GiB free, Ray is slow below {LEAST_SHARED}; in a container set --shm-size=8g"
        )
        yield "shared memory", f"{free:.2g} GiB free", small if free < LEAST_SHARED else ""
    yield from _gpus()
    for label, folder in (("disk of runs", config.run.dir), ("disk of the hub", _hub_cache())):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        yield label, f"{shutil.disk_usage(there).free / GIB:.0f} GiB free ({folder})", ""
    for port, user in PORTS.items():
        with socket.socket() as caller:
            taken = caller.connect_ex(("127.0.0.1", port)) == 0
        yield f"port {port}", f"{'taken' if taken else 'free'} ({user})", ""


def _gpus() -> Iterator[Line]:
    sizes = driver_gpus()
    yield "GPUs", ", ".join(f"{size:.0f} GiB" for size in sizes) or "none that NVIDIA's driver knows", ""
    if sizes:
        import torch

        count, built = torch.cuda.device_count(), torch.version.cuda
        fault = f"PyTorch sees {count} of {len(sizes)} GPUs: it was built for CUDA {built}; update the driver or install another build"
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            fault = ""  # a choice
        yield "PyTorch", f"sees {count}, built for CUDA {built}", fault if count < len(sizes) else ""


def driver_gpus() -> list[float]:
    """GiB of memory of each GPU that NVIDIA's driver knows; none where there is no driver."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) / 1024 for line in answer.split() if line.isdecimal()]


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def accounts() -> Iterator[Line]:
    """The hub's login and the Ray that jobs join."""
    from huggingface_hub import get_token

    yield "hub", "logged in" if get_token() else "not logged in; gated models need `hf auth login`", ""
    address = ray_address(os.environ)
    try:
        check_ray_address(os.environ)
        yield "Ray", f"joins {address}: {_cluster(address)}" if address else "a private one for each job", ""
    except ValueError as error:
        yield "Ray", "does not answer", str(error)


def _cluster(address: str) -> str:
    from flashdmd_ray.runtime.environment import use_loopback

    use_loopback(os.environ)
    from flashdmd_ray.runtime.cluster import machines_of_cluster

    machines = machines_of_cluster(address)
    amounts = (f"{sum(machine.get(kind, 0) for machine in machines):g} {kind}s" for kind in ("CPU", "GPU"))
    return ", ".join((f"{len(machines)} machines", *amounts))


def lacking(config: Config) -> list[str]:
    """List what keeps the configuration from being run here, one line each; nothing is loaded or created."""
    from flashdmd_ray.plan import check
    from flashdmd_ray.plan.forecast import gpus_of

    faults = []
    wanted, here = sum(gpus_of(config).values()), len(driver_gpus())
    if wanted > here and not ray_address(os.environ):
        faults.append(f"placement: wants {wanted:g} GPUs, here are {here}; choose another preset, or join a cluster")
    try:
        check(config)
    except ValueError as error:
        faults += map(one_line, str(error).splitlines())
    return faults
