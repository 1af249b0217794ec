"""`ray` for a worker node whose head is on the loopback address: `python loopback_ray.py start --address=127.0.0.1:6379 ...`.

Ray replaces 127.0.0.1 by the address of a network interface, and its switch against that (flashdmd_ray/runtime/environment.py) also
forbids worker nodes. So only this command runs without the switch, and with its effect; the processes it starts have the switch again.
"""

from __future__ import annotations

import os

SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
os.environ[SWITCH] = "1"

from ray._private import services  # noqa: E402 (the switch is read at import)
from ray.scripts.scripts import main  # noqa: E402


def loopback(address: str | None = None) -> str:
    return "127.0.0.1"


services.get_node_ip_address = loopback
os.environ[SWITCH] = "0"

if __name__ == "__main__":
    main()
