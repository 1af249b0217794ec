"""Serve's configuration files. Serve itself accepts and ignores unknown keys, so they are looked for here."""

from __future__ import annotations

import copy
import types
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

import kuberay
import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from flashdmd_ray.serving.settings import parse_settings

ROOT = Path(__file__).parents[2]


def one_machine() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    return content


def kubernetes() -> dict[str, Any]:
    resource = kuberay.read(ROOT / "deploy/kuberay/rayservice.yaml")
    assert isinstance(resource, kuberay.RayService)
    content: dict[str, Any] = yaml.safe_load(resource.spec.serveConfigV2)
    return content


def unknown_keys(annotation: Any, content: Any, place: str = "") -> list[str]:
    """Keys of `content` that no model in `annotation` has."""
    if isinstance(content, list):
        inner = next((arguments[0] for arguments in _arguments(annotation) if arguments), Any)
        return [key for number, item in enumerate(content) for key in unknown_keys(inner, item, f"{place}[{number}]")]
    models = [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if not isinstance(content, dict) or not models:
        return []
    fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
    found = [f"{place}.{key}" for key in content if key not in fields]
    return found + [
        k for key in content if key in fields for k in unknown_keys(fields[key], content[key], f"{place}.{key}")
    ]


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [kind for inner in typing.get_args(annotation) for kind in _alternatives(inner)]
    return [annotation]


def _arguments(annotation: Any) -> list[tuple[Any, ...]]:
    return [typing.get_args(kind) for kind in _alternatives(annotation) if typing.get_origin(kind) is list]


@pytest.fixture(params=[one_machine, kubernetes])
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = request.param()
    return loaded


def test_every_key_is_known(content: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(content)
    assert unknown_keys(ServeDeploySchema, content) == []
    for application in content["applications"]:
        parse_settings(application["args"])  # refuses unknown keys itself


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ((), "application"),
        (("http_options",), "prot"),
        (("applications", 0), "route_prefx"),
        (("applications", 0, "deployments", 0), "max_queued_request"),
        (("applications", 0, "deployments", 0, "ray_actor_options"), "num_gpu"),
    ],
)
def test_an_unknown_key_is_found(place: tuple[str | int, ...], key: str) -> None:
    content = copy.deepcopy(one_machine())
    inner: Any = content
    for name in place:
        inner = (
            inner.setdefault(name, [{"name": "Generator"}] if name == "deployments" else {})
            if isinstance(inner, dict)
            else inner[name]
        )
    inner[key] = 1
    (found,) = unknown_keys(ServeDeploySchema, content)
    assert found.endswith(f".{key}")


def test_the_application_is_there(content: dict[str, Any]) -> None:
    for application in content["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(import_module(module), name))
        assert application["route_prefix"] == "/", "the page and the API have fixed paths"


def test_one_machine_listens_on_loopback_and_a_pod_needs_a_key() -> None:
    assert one_machine()["http_options"]["host"] == "127.0.0.1"
    (application,) = kubernetes()["applications"]
    assert application["args"]["keys_file"], "whoever reaches a pod is a stranger"
