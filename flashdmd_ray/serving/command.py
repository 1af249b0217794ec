"""Command `flashdmd serve EXPORT_OR_RUN ...`: the service on this machine, until SIGTERM or Ctrl-C.

Exit codes: 0 stopped in order, 1 failed, 2 an option or a model is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashdmd_ray.config import apply_override, local_path
from flashdmd_ray.run.command_line import add_set, run_command
from flashdmd_ray.run.http_server import default_bounds, listen_on, running_server
from flashdmd_ray.run.interruption import stop_signals
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.run.progress import still
from flashdmd_ray.run.variables import check_ray_address
from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.api_keys import VARIABLE, ApiKeys, is_loopback, read_keys
from flashdmd_ray.serving.model_sources import open_source
from flashdmd_ray.serving.settings import ServeSettings, parse_settings

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from flashdmd_ray.runtime.cluster import Cluster

APPLICATION = "flashdmd_ray"
SERVE_LOGS = {"enable_access_log": False}
"""Log settings of Serve. Requests have a line of ours in the log; its own would be a second one."""
FAILED_START = "failed to start"
"""In what Serve says of a replica that it starts again; its status tells only of the last attempt."""
START_LOOK_S = 0.2
"""Between two looks at replicas that start."""
LOOK_S = 1.0
"""Between two looks at the private Ray: without it no replica is replaced, and later none answers."""
CONTROLLER_LOGS = {"log_level": "CRITICAL"}
"""Log settings of Serve's controller: it would add a traceback to the one line that a replica which cannot start logs itself."""


def serve_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(arguments)
    return run_command(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    settings = parse_settings(settings_tree(options.models, options.set))
    check_address(options.host, settings)
    check_ingress(settings)
    for source in settings.models.values():
        open_source(source, settings.registry)
    return run(settings, options.host, options.port)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="flashdmd serve",
        description="Serve exported students by an OpenAI-compatible images API.",
        epilog="Every key of --set is explained in flashdmd_ray/serving/settings.py.",
    )
    parser.add_argument(
        "models",
        metavar="[NAME=]EXPORT_OR_RUN",
        nargs="+",
        help="an export, a run folder or models:/name@alias; without NAME it is called after its folder",
    )
    add_set(parser, "replica.count=2 limits.images=4")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8000, help="default: %(default)s")
    return parser.parse_args(arguments)


def port_number(text: str) -> int:
    """Parse a TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"'{text}' is no port: 1 to 65535")
    return int(text)


def settings_tree(models: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Build the arguments of `build_app`. Raises ValueError for two models of one name."""
    tree: dict[str, Any] = {"models": {}}
    for text in models:
        name, source = name_source(text)
        if name in tree["models"]:
            raise ValueError(f"two models are called '{name}': name them, for example a={source}")
        tree["models"][name] = source
    for override in overrides:
        apply_override(ServeSettings, tree, override)
    return tree


def name_source(text: str) -> tuple[str, str]:
    """Split 'NAME=SOURCE', or name a source after its folder: runs/demo and runs/demo/export are 'demo'."""
    name, separator, source = text.partition("=")
    if separator and "/" not in name:
        return name, source
    if text.startswith("models:/"):
        return text.removeprefix("models:/").split("@")[0].split("/")[0], text
    path = local_path(text).resolve()
    return (path.parent if path.name in ("export", "lora", "kohya") else path).name, str(path)


def check_address(host: str, settings: ServeSettings) -> None:
    """Raise ValueError for an address that others reach, or web pages of any site, where there are no keys."""
    keys = read_keys(settings.keys_file)
    ApiKeys(keys, settings.cors_origins)
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host {host}: whoever reaches this machine could draw; set {VARIABLE} or keys_file, or listen on 127.0.0.1"
        )


def check_ingress(settings: ServeSettings) -> None:
    """Raise ValueError for ingress replicas, which this command would not use."""
    if settings.ingress != 1:
        raise ValueError(
            "ingress: flashdmd serve answers HTTP itself; `serve deploy` has ingress replicas. Leave it out"
        )


def run(settings: ServeSettings, host: str, port: int) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError for an address that is taken and a model that cannot be served."""
    check_ray_address(os.environ)
    listener = listen_on(host, port)

    from flashdmd_ray.runtime.environment import use_loopback, use_quick_handles

    use_loopback(os.environ)
    use_quick_handles(os.environ)

    from ray import serve

    from flashdmd_ray.runtime.cluster import Cluster
    from flashdmd_ray.serving.app import api_over, build_replicas, on_gpus

    say(f"starting Ray and loading {', '.join(settings.models)}")
    with contextlib.ExitStack() as ends:
        with still(say, lambda: "Ray is starting"):
            cluster = Cluster.join()
        ends.callback(cluster.leave)
        settings = on_gpus(settings)
        if settings.replica.has_gpu:
            say(f"GPUs found, used so: {settings.replica.gpus:.3g} by each of {settings.replica.count} replicas")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # Serve's own lines; ours, of its child, are all shown
        logging.getLogger(LOGGER).setLevel(logging.INFO)
        with still(say, lambda: "Ray Serve is starting"):
            serve.start(proxy_location="Disabled", logging_config=SERVE_LOGS | CONTROLLER_LOGS)
        if not cluster.private:
            ends.callback(_withdraw)
        generator = start_replicas(build_replicas(settings))
        stop = until_stopped()
        bounds = default_bounds(settings.limits.connections, settings.limits.connections_per_address)
        with running_server(api_over(generator, settings), listener, stop, settings.replica.drain_s, bounds):
            say(f"ready: http://{host}:{port}/")
            wait_while_alive(stop, cluster)
            say("stopping: requests that are here are finished")
    return 0


def start_replicas(replicas: Application) -> DeploymentHandle:
    """Deploy the replicas and wait until all are up. Raises ValueError with the reason of the first that cannot start.

    Serve would try again, which helps against a process that was lost and not against a model that cannot be loaded.
    """
    from ray import serve

    target = serve.RunTarget(replicas, name=APPLICATION, route_prefix=None, logging_config=SERVE_LOGS)
    (generator,) = serve.run_many([target], wait_for_applications_running=False)
    states = "none yet"
    with still(say, lambda: f"replicas: {states}"):
        while (application := serve.status().applications[APPLICATION]).status != "RUNNING":
            deployments = application.deployments.values()
            said = "\n".join([application.message, *(deployment.message for deployment in deployments)])
            if application.status == "DEPLOY_FAILED" or FAILED_START in said:
                raise ValueError(_reason(said))
            counts = [count for deployment in deployments for count in deployment.replica_states.items()]
            states = ", ".join(f"{count} {state.lower()}" for state, count in counts) or states
            time.sleep(START_LOOK_S)
    return generator


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def wait_while_alive(stop: threading.Event, cluster: Cluster) -> None:
    """Wait until `stop` is set. Raises WorkerLost when a private Ray has lost a process: nothing would bring it back."""
    while not stop.wait(LOOK_S):
        cluster.check()


def _withdraw() -> None:
    """Remove the application from a cluster that outlives this command, and Serve itself where no other application is left."""
    from ray import serve

    serve.delete(APPLICATION)
    if not serve.status().applications:
        serve.shutdown()


def until_stopped() -> threading.Event:
    """Return an event that the first SIGTERM or Ctrl-C sets from now on; before, they end the command where it is."""
    stop = threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stop.set())
    return stop


def _reason(text: str) -> str:
    """Find the line that a replica ended with in Serve's report of it."""
    errors = re.findall(r"ValueError: (.+)", text)
    return errors[0] if errors else one_line(text, 600)
