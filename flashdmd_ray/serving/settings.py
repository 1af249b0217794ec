"""Settings of the service: the `args` of `build_app` and the keys of `flashdmd serve --set`. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flashdmd_ray.config import (
    LocalPath,
    PathOrName,
    PositiveFloat,
    PositiveInt,
    Section,
    TrackingUrl,
    suggestion,
    validated,
)

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TEACHER = ":teacher"
"""Suffix of a student's name that makes the name of its teacher."""
ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
HOOK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class LimitSettings(Section):
    """Limits of one request, and of one key. What is larger is refused before anything is generated."""

    body_bytes: PositiveInt = 65_536
    """Bytes of a request's body; more is answered with 413."""
    body_seconds: PositiveFloat = 10.0
    """Seconds for a request's body to arrive; later is answered with 408."""
    connections: PositiveInt | None = None
    """Open connections of flashdmd serve; null is a third of the process's file descriptors (`ulimit -n`), 4,096 at most."""
    connections_per_address: PositiveInt | None = None
    """Open connections of one client address; null is half of all. Behind a proxy all clients have the proxy's address."""
    prompt_characters: PositiveInt = 1000
    """Characters of a prompt. Text encoders read about 75 tokens, however long it is."""
    images: Annotated[int, Field(strict=True, ge=1, le=10)] = 10
    """Images of one request (`n`)."""
    pixels: PositiveInt = 16 * 1024 * 1024
    """Pixels of all images of one request together: bounds `n` for large models."""
    teacher_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of `queue` that requests to teachers may have; at least one place. An image of theirs takes many times the forwards."""
    images_per_minute: PositiveFloat | None = None
    """Images per minute for each key (without keys: each client address), in the long run; null is no limit.

    Counted by forwards, in images of a student in its trained number of steps: a teacher's image counts as many. Each ingress replica
    counts alone."""
    burst: PositiveInt = 60
    """Images that a key may ask for at once after a pause, with `images_per_minute`."""


class ReplicaSettings(Section):
    """Processes that generate images."""

    count: PositiveInt = 1
    """Number that there always is. With two, one goes on when the other is lost."""
    most: PositiveInt | None = None
    """Largest number under load; null is `count`: no autoscaling."""
    target_requests: PositiveFloat = 8.0
    """Unanswered requests per replica that autoscaling aims at."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that Ray reserves for each."""
    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs of each: 1, or a fraction to share one. With 0 it computes on the CPU. auto: one of those that Ray knows, or a share where
    they are fewer than replicas; on the CPU where there is none."""
    threads: PositiveInt = 1
    """Threads of torch in each. Small models are faster with two replicas of one thread than with one of two."""
    batch: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    """Largest number of images in one forward."""
    drain_s: PositiveFloat = 30.0
    """Seconds at most for a replica that is to go to finish what it has."""

    def on(self, gpus: int) -> ReplicaSettings:
        """These settings where Ray knows so many GPUs."""
        if self.gpus != "auto":
            return self
        replicas = max(self.count, self.most or 0)
        return self.model_copy(update={"gpus": 1 / math.ceil(replicas / gpus) if gpus else 0.0})

    @property
    def has_gpu(self) -> bool:
        """True when a replica computes on a GPU."""
        return self.gpus != "auto" and self.gpus > 0


class ServeSettings(Section):
    """All settings of the service."""

    models: Annotated[dict[str, PathOrName], Field(min_length=1)]
    """Name -> source: a directory that `flashdmd export` wrote (a pipeline or a LoRA), a run folder (its export, or the
    newest checkpoint while it has none), or `models:/name@alias` or `models:/name/version` of an MLflow registry."""
    default: str | None = None
    """Model of a request that names none; null is the first."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other name -> name in `models`, for example gpt-image-1 for clients that cannot be told a name."""
    teachers: bool = True
    """Offer the teacher that a student was distilled from as `<name>:teacher`, where it can be found."""
    teacher_steps: Annotated[int, Field(strict=True, ge=1, le=100)] = 25
    """Denoising steps of teachers."""
    teacher_guidance: Annotated[float, Field(ge=1)] = 2.0
    """Classifier-free guidance of teachers; 1 is none. The demo's pictures use 2."""
    bases: dict[str, PathOrName] = Field(default_factory=dict)
    """Name of a base in an export's flashdmd.json -> directory or hub id of that pipeline, where the name alone is not enough."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    registry: TrackingUrl | None = None
    """Tracking URI of the MLflow registry; null is MLflow's own default (MLFLOW_TRACKING_URI)."""
    watch_s: PositiveFloat | None = 5.0
    """Seconds between looks at each source; a new version takes the old one's place. null: only at the start."""
    fetch_s: PositiveFloat = 600.0
    """Seconds for a version to be copied, downloaded, or exported from a checkpoint; what takes longer is refused."""
    cache: LocalPath | None = None
    """Folder for copies of what is served, so that a version outlives its source; null is ~/.cache/flashdmd_ray/serving."""
    replica: ReplicaSettings = ReplicaSettings()
    """Processes that generate."""
    limits: LimitSettings = LimitSettings()
    """What one request, connection or key may ask for."""
    queue: PositiveInt = 64
    """Requests in the service, in sampling or waiting, per process that answers HTTP; more are answered with 429."""
    ingress: PositiveInt = 1
    """Ingress replicas of `serve deploy`: processes that answer HTTP. flashdmd serve answers HTTP itself."""
    deadline_s: PositiveFloat = 60.0
    """Seconds for one request, waiting and retries included; later is answered with 504."""
    keys_file: LocalPath | None = None
    """File with one API key per line ('#' begins a comment), beside those of FLASHDMD_API_KEYS.

    Without any key only loopback clients are served."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the API from browsers, by origin such as https://studio.example; "*" is any, and needs API keys."""
    prompt_filter: str | None = None
    """Filter `module:function` that is called with each prompt and returns None, or why it is refused. None is shipped."""
    image_checker: str | None = None
    """Checker `module:function` that is called with each image (PIL) and returns None, or why it is withheld. None is shipped."""
    log_prompts: bool = False
    """Write prompts to the log of the process that answers HTTP."""

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, str]) -> dict[str, str]:
        for name, source in models.items():
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"'{name}' must be up to 64 letters, digits, '.', '_' or '-'")
            if not source.strip():
                raise ValueError(f"'{name}' has no source")
        return models

    @field_validator("aliases")
    @classmethod
    def _plain_aliases(cls, aliases: dict[str, str]) -> dict[str, str]:
        for alias in aliases:
            if not MODEL_NAME.fullmatch(alias):
                raise ValueError(f"'{alias}' must be up to 64 letters, digits, '.', '_' or '-'")
        return aliases

    @field_validator("cors_origins")
    @classmethod
    def _plain_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' must be an origin such as https://studio.example:8443, without a path, or '*'"
                )
        return origins

    @field_validator("prompt_filter", "image_checker")
    @classmethod
    def _import_path(cls, hook: str | None) -> str | None:
        if hook is not None and not HOOK.fullmatch(hook):
            raise ValueError(f"'{hook}' must be module:function")
        return hook

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for key, name in [("default", self.default), *((f"aliases.{a}", name) for a, name in self.aliases.items())]:
            if name is not None and name not in self.models:
                raise ValueError(f"{key}: no model '{name}'{suggestion(name, list(self.models))}")
        if taken := set(self.aliases) & set(self.models):
            raise ValueError(f"aliases.{min(taken)}: is a model's own name; choose another")
        if self.replica.most is not None and self.replica.most < self.replica.count:
            raise ValueError(f"replica.most: {self.replica.most} is less than replica.count, {self.replica.count}")
        return self

    @property
    def default_model(self) -> str:
        """Name of the model of a request that names none."""
        return self.default or next(iter(self.models))


def parse_settings(tree: Mapping[str, Any]) -> ServeSettings:
    """Check the arguments of `build_app`. Raises ValueError, one line per problem, naming the key and the remedy."""
    return validated(ServeSettings, tree)
