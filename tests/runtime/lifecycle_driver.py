"""A driver of its own for tests of ends and losses: starts or joins a Ray with one worker, says so, and waits to be ended.

Arguments: `wait`; `learner` for a worker that holds trained state.
"""

import signal
import sys
from collections.abc import Callable

from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import Runtime, Supervisor, build_runtime

# A shell that starts something in the background has it ignore Ctrl-C; here it must arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)
group = "learner" if "learner" in sys.argv else "reward"


def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> None:
    role = runtime.rewards["reward"] if group == "reward" else runtime.generator
    print("worker", role.pids().item(), flush=True)
    while "wait" in sys.argv:
        runtime.step = 0
        role.sleeps(0.1)


Supervisor(toy_config(deadlines__attempts=2).deadlines).run(
    attempt,
    lambda previous: build_runtime(
        toy_config(), {group: TOYS[group]}, say=lambda line: print(line, flush=True), previous=previous
    ),
)
print("closed", flush=True)
