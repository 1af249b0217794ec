"""A driver of its own, for test_lifecycle.py: brings up a private Ray with one worker, says so, and waits to be ended."""

import signal
import sys
import time

from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import Runtime, build_runtime, run_supervised

# A shell that starts something in the background has it ignore Ctrl-C; here it must arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)
roles = {"reward": TOYS["reward"]}


def attempt(runtime: Runtime) -> None:
    print("worker", runtime.rewards["reward"].pids().item(), flush=True)
    while "wait" in sys.argv:
        time.sleep(0.1)


run_supervised(attempt, lambda: build_runtime(toy_config(), roles), max_attempts=1)
print("closed", flush=True)
