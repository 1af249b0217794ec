"""Rewards, and how a server is asked for one."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from flashdmd_ray.catalog.rewards import REWARDS, RewardEntry, kind_of_file
from flashdmd_ray.config.section import PathOrName, PositiveFloat, PositiveInt, Section, suggestion

LONGEST_NAME = 100


class RemoteConfig(Section):
    timeout_s: PositiveFloat = 60.0
    """For one attempt: connecting, sending, waiting and reading the whole answer."""
    attempts: PositiveInt = 3
    """In all; half a second, one, two ... lie between them, or what the server asks for in Retry-After, at most 30."""
    encoding: Literal["json", "safetensors"] = "json"
    """json: base64 PNG, readable by anything. safetensors: raw bytes, larger and without the work of packing."""
    token_env: str | None = None
    """Environment variable of the workers whose value is sent as bearer token; null sends none."""
    use_proxy: bool = False
    """true: through the proxy that http_proxy, https_proxy or all_proxy names, except to hosts in no_proxy and loopback addresses."""


def _known_kind(kind: str) -> str:
    if kind.startswith("hpsv3"):
        raise ValueError(
            f"the reward '{kind}' is not built in: it is a 7B model that pins other packages; serve it and use kind remote, "
            "see docs/rewards.md"
        )
    if kind not in REWARDS:
        raise ValueError(f"unknown reward '{kind}'{suggestion(kind, list(REWARDS))}; known: {', '.join(REWARDS)}")
    return kind


def _metric_name(name: str) -> str:
    """The name itself when every reader of metrics takes it. MLflow has the narrowest rules."""
    plain = re.fullmatch(r"([\w.\-]([\w.\- ]*[\w.\-])?)?", name)
    if not plain or name in (".", "..") or len(name) > LONGEST_NAME:
        raise ValueError(
            f"must be letters, digits, spaces, '_', '-' and '.', at most {LONGEST_NAME} of them and no space at the ends: MLflow takes no "
            "other name of a metric"
        )
    return name


class RewardConfig(Section):
    kind: Annotated[str, AfterValidator(_known_kind), Field(json_schema_extra={"enum": list(REWARDS)})]
    """pickscore, hpsv2, hpsv2.1, imagereward, clipscore, aesthetic or mps: published models of images and prompts. latent: a latent reward
    model. latent_clip: a CLIP reward on latents. remote: a server's. custom: a class of your own. See docs/rewards.md."""
    name: Annotated[str, AfterValidator(_metric_name)] = ""
    """Its name in metrics, of letters, digits, spaces, '_', '-' and '.'; the kind when empty."""
    path: PathOrName = "demo"
    """'demo' (pickscore, latent, latent_clip), a directory, a hub id, a file, or owner/name/file on the hub; the server's URL (remote);
    package.module:Class (custom)."""
    base: PathOrName | None = None
    """Directory or hub id of what `path` leaves out: tokenizer and image processor, for aesthetic also CLIP's image tower, for a latent
    reward in LPO's layout the pipeline with its tokenizers. null is `path` itself where it is such a directory, else the repository that
    the published model was made with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and activations of the model; rewards are float32 in any. Half precision rounds away small differences between images."""
    batch: PositiveInt = 16
    """Images that the model looks at in one go, which bounds its memory."""
    weight: PositiveFloat = 1.0
    """Weight after normalisation within the prompt group."""
    held_out: bool = False
    """true: logged, never optimised. A judge that training does not know."""
    every: PositiveInt = 1
    """Only with held_out: score the candidates of every n-th step with preference updates. Where no other reward reads images, the other
    steps decode none, which at 1024 pixels costs as much as all forwards of the candidates."""
    skip_noise_check: str | None = None
    """Why this reward may prefer a destroyed image to a clean one, such as 'measures brightness'; null: a run with it is refused then."""
    pool: Annotated[str, AfterValidator(_metric_name)] | None = None
    """Rewards that name the same pool share its workers and one call; null is a pool of its own, under the reward's label."""
    remote: RemoteConfig | None = None
    """How a server is asked; null is the defaults. Only for kind remote."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments that the class is built with. Only for kind custom."""

    @property
    def entry(self) -> RewardEntry:
        """The registry's row of this kind."""
        return REWARDS[self.kind]

    @property
    def label(self) -> str:
        return self.name or self.kind

    @property
    def pool_name(self) -> str:
        """The pool whose workers hold this reward."""
        return self.pool or self.label

    @property
    def reads_images(self) -> bool:
        """Return True if it judges decoded images; a latent reward reads the latent itself."""
        return not self.entry.reads_latents

    @property
    def base_path(self) -> str:
        """Resolved location of `base`; empty for kinds that read none."""
        known = self.entry
        if known.base is None:
            return ""
        if self.base is not None or self.path == known.path:
            return self.base or known.base
        is_file = Path(self.path).is_file()
        whole = (not known.files and not is_file) or (Path(self.path) / "tokenizer_config.json").is_file()
        return self.path if whole else known.base

    @model_validator(mode="before")
    @classmethod
    def _remote_defaults(cls, tree: Any) -> Any:
        entry = REWARDS.get(str(tree.get("kind"))) if isinstance(tree, Mapping) else None
        if entry is not None and entry.path_is == "url" and tree.get("remote") is None:
            return {**tree, "remote": {}}
        return tree

    @model_validator(mode="after")
    def _together(self) -> Self:
        self._check_path()
        if self.base is not None and not self.base_path and not self.entry.optional_base:
            raise ValueError(f"base: a reward of kind '{self.kind}' reads none; leave it null")
        if self.remote is not None and self.entry.path_is != "url":
            raise ValueError("remote: goes with kind remote; leave it null")
        if self.options and self.entry.path_is != "class":
            raise ValueError("options: go with kind custom; leave them out")
        return self

    def _check_path(self) -> None:
        if self.entry.path_is == "url":
            _check_url(self.path)
        elif self.entry.path_is == "class":
            if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.path):
                raise ValueError(f"path: kind custom needs package.module:Class, got '{self.path}'")
        elif (named := kind_of_file(Path(self.path).name) or self.kind) != self.kind:
            raise ValueError(
                f"path: that file holds a reward of kind '{named}', not '{self.kind}'; correct one of them"
            )
        elif self.path == "demo" and self.entry.demo is None:
            raise ValueError(
                f"path: the package has no demo weights of kind '{self.kind}'; name them, such as {self.entry.path}"
            )


def _check_url(text: str) -> None:
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"path: kind remote needs the server's http:// or https:// address, got '{text}'")
    if url.username or url.password:
        raise ValueError(
            "path: no user or password in an address; put a token into the variable that remote.token_env names"
        )
