"""The command `flashdmd reward serve`: a reward model behind HTTP. Its help imports no torch.

Exit codes: 0 stopped by a signal, 2 an option or the model is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashdmd_ray.run.command_line import run_command


def reward_serve_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd reward serve KIND PATH ...`: answer until a signal comes; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd reward serve",
        description="Serve a reward on images over HTTP, for rewards of kind 'remote'.",
        epilog="A job uses it with: {kind: remote, path: http://HOST:PORT/score}",
    )
    parser.add_argument("kind", help="pickscore, hpsv2.1, imagereward, ..., or custom")
    parser.add_argument("path", help="its weights, or module:Class of a class of your own; `demo`: the packaged reward")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--token-env", metavar="NAME", help="variable with the bearer token that clients must send")
    options = parser.parse_args(arguments)
    from flashdmd_ray.serving.reward_server import serve_reward

    return run_command(lambda: serve_reward(options))
