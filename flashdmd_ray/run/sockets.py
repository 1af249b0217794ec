"""The address at which a job can be looked at. Imports nothing heavy."""

from __future__ import annotations

import socket

from flashdmd_ray.config import ControlConfig


def listen(config: ControlConfig) -> socket.socket:
    """A socket that listens where the configuration says. Raises ValueError when the address cannot be had."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"control: cannot listen on {config.host}:{config.port} ({error.strerror or error}); "
            "set control.port to 0 for any free one, or control.enabled to false"
        ) from None
    return listener
