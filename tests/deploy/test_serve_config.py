"""Serve's configuration files. Serve itself accepts and ignores unknown keys, so its schemas are applied here with every key known."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from kuberay_schemas import strict
from ray.serve.schema import ServeDeploySchema
from test_kuberay import FOLDER, ROOT, build

from flashdmd_ray.serving.settings import parse_settings

SCHEMA = Draft202012Validator(strict(ServeDeploySchema.model_json_schema()))


def one_machine() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    return content


def kubernetes(device: str) -> dict[str, Any]:
    (resource,) = build(FOLDER / f"{device}-service")
    content: dict[str, Any] = yaml.safe_load(resource["spec"]["serveConfigV2"])
    return content


CONTENTS = {"one machine": one_machine(), "cpu": kubernetes("cpu"), "gpu": kubernetes("gpu")}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_key_is_known_and_the_application_is_there(name: str) -> None:
    content = CONTENTS[name]
    ServeDeploySchema.model_validate(content)
    assert [error.message for error in SCHEMA.iter_errors(content)] == []
    for application in content["applications"]:
        parse_settings(application["args"])  # refuses unknown keys itself
        module, _, function = application["import_path"].partition(":")
        assert callable(getattr(import_module(module), function))
        assert application["route_prefix"] == "/", "the page and the API have fixed paths"


def test_an_unknown_key_is_found() -> None:
    content = one_machine()
    content["applications"][0]["deployments"] = [{"name": "Generator", "ray_actor_options": {"num_gpu": 1}}]
    assert "num_gpu" in " ".join(error.message for error in SCHEMA.iter_errors(content))


def test_one_machine_listens_on_loopback_and_a_pod_needs_a_key() -> None:
    assert CONTENTS["one machine"]["http_options"]["host"] == "127.0.0.1"
    for device in ("cpu", "gpu"):
        (application,) = CONTENTS[device]["applications"]
        assert application["args"]["keys_file"], "whoever reaches a pod is a stranger"


def test_the_gpu_service_is_the_cpu_service_on_a_gpu() -> None:
    gpu = kubernetes("gpu")
    assert gpu["applications"][0]["args"]["replica"].pop("gpus") == 1
    cpu = kubernetes("cpu")
    assert cpu["applications"][0]["args"]["replica"].pop("gpus") == 0
    assert gpu == cpu
