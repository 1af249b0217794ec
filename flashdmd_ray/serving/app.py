"""Ray Serve application: an ingress that answers HTTP, and replicas that generate images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from flashdmd_ray.runtime.environment import worker_environment
from flashdmd_ray.serving.api import build_api
from flashdmd_ray.serving.api_keys import read_keys
from flashdmd_ray.serving.generator_client import GeneratorClient
from flashdmd_ray.serving.hooks import load_hook
from flashdmd_ray.serving.replica import GeneratorReplica
from flashdmd_ray.serving.settings import ServeSettings, parse_settings

GENERATOR, INGRESS = "Generator", "Ingress"


def build_app(args: Mapping[str, Any]) -> Application:
    """Build the application of `settings.ServeSettings`, for `serve run` and `serve deploy`.

    Raises ValueError, one line per problem, for arguments that make no sense.
    """
    settings = parse_settings(args)
    return _ingress(settings).bind(build_replicas(settings))


def on_gpus(settings: ServeSettings) -> ServeSettings:
    """Put the replicas on the GPUs of the Ray that this process is connected to, where the settings leave it open."""
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    return settings.model_copy(update={"replica": settings.replica.on(gpus)})


def build_replicas(settings: ServeSettings) -> Application:
    """Build the replicas alone, for a process that answers HTTP itself, as flashdmd serve does."""
    settings = on_gpus(settings)
    return _replicas(settings).bind(settings)


def api_over(generator: DeploymentHandle, settings: ServeSettings) -> Starlette:
    """Make the API over a handle of the deployment. Raises ValueError for a hook or a file of keys that cannot be read."""
    return build_api(
        settings, GeneratorClient(generator), read_keys(settings.keys_file), load_hook(settings.prompt_filter)
    )


def _replicas(settings: ServeSettings) -> serve.Deployment:
    replica = settings.replica
    scaling: dict[str, Any] = {"num_replicas": replica.count}
    if replica.most is not None and replica.most > replica.count:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replica.count,
                "max_replicas": replica.most,
                "target_ongoing_requests": replica.target_requests,
                "upscale_delay_s": 3.0,
                "downscale_delay_s": 120.0,
            }
        }
    return serve.deployment(
        GeneratorReplica,
        name=GENERATOR,
        # Replicas hold all requests, so that they can give turns; where Serve let some wait, those would go first come, first served.
        max_ongoing_requests=settings.queue * settings.ingress + 16,  # room to ask which models there are
        max_queued_requests=settings.queue * settings.ingress + 16,
        graceful_shutdown_timeout_s=replica.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5.0,
        ray_actor_options={
            "num_cpus": replica.cpus,
            "num_gpus": float(replica.gpus),
            "runtime_env": {"env_vars": worker_environment(replica.threads, float(replica.gpus))},
        },
        **scaling,
    )


def _ingress(settings: ServeSettings) -> serve.Deployment:
    def asgi() -> Starlette:
        context = serve.get_replica_context()
        return api_over(serve.get_deployment_handle(GENERATOR, app_name=context.app_name), settings)

    return serve.deployment(
        serve.ingress(asgi)(),
        name=INGRESS,
        num_replicas=settings.ingress,
        # The application counts its own queue and answers in OpenAI's shape. Serve, which answers 503 in plain text, counts a
        # request as queued while it chooses a replica, so many that come in one instant are all queued there.
        max_ongoing_requests=2 * settings.queue + 100,
        max_queued_requests=2 * settings.queue + 1000,
        graceful_shutdown_timeout_s=settings.replica.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0.1},
    )
