"""A driver of its own for tests of ends and losses: starts a Ray with one worker and says so; argument `wait`: waits to be ended."""

import signal
import sys
from collections.abc import Callable

from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import Runtime, Supervisor, build_runtime

# A shell that starts something in the background has it ignore Ctrl-C; here it must arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)


def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> None:
    print("worker", runtime.rewards["reward"].pids().item(), flush=True)
    while "wait" in sys.argv:
        runtime.step = 0
        runtime.rewards["reward"].sleeps(0.1)


Supervisor(toy_config(deadlines__attempts=2).deadlines).run(
    attempt,
    lambda previous: build_runtime(
        toy_config(), {"reward": TOYS["reward"]}, say=lambda line: print(line, flush=True), previous=previous
    ),
)
print("closed", flush=True)
