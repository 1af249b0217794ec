"""Pools of a running job from the command line: how they are, and how many workers they shall have. No torch, no Ray.

Exit codes: 0 done, 1 the job does not answer, 2 the folder, a pool or a size is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.plan.text import table
from flashdmd_ray.run.command_line import FAILED, path_argument, prepare_process, refuse, say
from flashdmd_ray.run.folder import CONTROL

ANSWER_S = 30.0


def scale_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd scale RUN [pool=workers ...]`: print the pools of a running job, or resize some of them first."""
    parser = argparse.ArgumentParser(
        prog="flashdmd scale", description="Look at the pools of a running job, and give them more or fewer workers."
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="folder of the training run, for example runs/demo"
    )
    parser.add_argument("sizes", metavar="pool=workers", nargs="*", help="new sizes, for example rollout=2 reward=4")
    options = parser.parse_args(arguments)
    prepare_process()
    try:
        sizes = dict(_size(text) for text in options.sizes)
        pools = ask(options.run, sizes)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        say(str(error))
        return FAILED
    print("\n".join(describe(pools)))
    return 0


def _size(text: str) -> tuple[str, int]:
    name, separator, workers = text.rpartition("=")
    if not separator or not name or not workers.isdecimal():
        raise ValueError(f"{text}: expected pool=workers, for example reward=4")
    return name, int(workers)


def ask(run: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Pool -> its state, after resizing. Raises ValueError for what the job refuses, OSError when it does not answer."""
    path = run / CONTROL
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        url, token = str(facts["url"]), str(facts["token"])
    except FileNotFoundError:
        raise ValueError(
            f"{run}: no job with pools runs there (no {CONTROL}); name the folder of a running job with runtime 'ray'"
        ) from None
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} cannot be read as the address of a job; only the job's own user can read it"
        ) from None
    request = urllib.request.Request(f"{url}/pools", headers={"Authorization": f"Bearer {token}"})
    if sizes:
        request.method, request.data = "PUT", json.dumps(sizes).encode()
        request.add_header("Content-Type", "application/json")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the job is here, whatever a proxy says
    try:
        with opener.open(request, timeout=ANSWER_S) as answer:
            pools: dict[str, dict[str, Any]] = json.load(answer)
            return pools
    except urllib.error.HTTPError as error:
        raise ValueError(_reason(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"{run}: the job does not answer at {url} ({error}); it may have been killed") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the job answered {error.code} {error.reason}"


def describe(pools: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row for each pool."""
    rows = []
    for name, state in pools.items():
        bounds = "fixed" if state["low"] == state["high"] else f"{state['low']} to {state['high']}"
        figures = [str(state[key]) for key in ("size", "ready", "busy", "waiting")]
        rows.append([name, *figures, f"{100 * state['busy_share']:.0f} %", bounds])
    return table(["pool", "workers", "ready", "in a call", "calls waiting", "busy, last step", "by itself"], rows)
