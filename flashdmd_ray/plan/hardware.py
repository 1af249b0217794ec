"""Rates of GPUs and links from their data sheets, and the share of them that is reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """matmul: dense bfloat16 operations a second with float32 sums, tf32: those of float32 numbers on the same units.
    memory: bytes a second. link, host: bytes a second to a GPU of the same machine, and to host memory. price: dollars an hour."""

    name: str
    matmul: float
    tf32: float
    memory: float
    link: float
    host: float
    price: float
    gib: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989e12, 495e12, 3.35e12, 450e9, 55e9, 2.5, 80),
        Gpu("h200", 989e12, 495e12, 4.8e12, 450e9, 55e9, 3.5, 141),
        Gpu("a100", 312e12, 156e12, 2.0e12, 300e9, 25e9, 1.5, 80),
        Gpu("rtx4090", 165e12, 82e12, 1.0e12, 25e9, 25e9, 0.4, 24),
    )
}
"""Data sheets of NVIDIA; prices are rough ones of rented machines in 2026, to be replaced by one's own."""


def gpu_named(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, such as "NVIDIA GeForce RTX 4090"; None for one that is not in the table."""
    plain = name.lower().replace(" ", "")
    return next((gpu for gpu in GPUS.values() if gpu.name in plain), None)


UTILISATION = 0.4
"""Share of `matmul` that diffusion networks reach, an assumption: nothing here was measured on such a GPU."""
LAUNCH_S = 8e-6
"""Seconds of Python and driver for each kernel: a call takes at least so long for each of them. An assumption as well."""
NETWORK = 40e9
"""Bytes a second between machines for each GPU: a port of 400 Gb/s of its own. An assumption as well."""
GPUS_OF_A_MACHINE = 8
