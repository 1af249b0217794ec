"""Prometheus figures of one process that answers HTTP, for GET /metrics. Names and labels hold no prompt and no key."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from flashdmd_ray.serving.messages import ImageJob, ImageResult, ModelInfo

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUTES = ("/v1/images/generations", "/v1/models", "/healthz", "/metrics", "/openapi.json")


class Metrics:
    """Counters of the service; never raise, never wait."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "flashdmd_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "flashdmd_request_seconds",
            "From a request to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._images = Counter("flashdmd_images", "Images drawn.", ["model"], registry=self._registry)
        self._queued = Histogram(
            "flashdmd_queue_seconds", "Before the first forward.", ["model"], buckets=SECONDS, registry=self._registry
        )
        self._sampling = Histogram(
            "flashdmd_draw_seconds",
            "From the first forward to the pixels.",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "flashdmd_batch_images", "Images in a request's largest forward.", buckets=BATCHES, registry=self._registry
        )
        self._inside = Gauge("flashdmd_requests_inside", "Image requests drawn or waiting.", registry=self._registry)
        self._loaded = Gauge(
            "flashdmd_model_loaded", "1 for the version that is served.", ["model", "version"], registry=self._registry
        )
        self._refused = Gauge(
            "flashdmd_model_refused", "1 while a newer version is refused.", ["model"], registry=self._registry
        )

    def record_answer(self, path: str, status: int, seconds: float) -> None:
        """Count one request, whatever became of it; status 0 is a client that did not wait."""
        label = next((route for route in ROUTES if path == route or path.startswith(route + "/")), "other")
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label).observe(seconds)

    def record_result(self, job: ImageJob, result: ImageResult) -> None:
        """Count the images of a job, their seconds and their batch."""
        self._images.labels(job.model).inc(len(result.images))
        self._queued.labels(job.model).observe(result.queue_s)
        self._sampling.labels(job.model).observe(result.sampling_s)
        self._batch.observe(result.batch)

    def set_inside(self, requests: int) -> None:
        """Show how many image requests are in the service."""
        self._inside.set(requests)

    def page(self, models: Sequence[ModelInfo]) -> Response:
        """Make the answer to GET /metrics."""
        self._loaded.clear()
        for model in models:
            self._loaded.labels(model.name, model.version).set(1)
            self._refused.labels(model.name).set(model.refused is not None)
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
