"""docker-compose.yml: every key is known, and what it promises about networks, users and secrets holds."""

from __future__ import annotations

import subprocess

import pytest
from compose_file import ROOT, ComposeFile, content_of, read
from pydantic import ValidationError

FILE = read()
RAY = ("ray-head", "ray-worker")


def test_the_services_are_those_of_the_documentation() -> None:
    assert set(FILE.services) == {*RAY, "mlflow", "serve"}


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ((), "service"),
        (("services", "serve"), "port"),
        (("services", "serve", "healthcheck"), "retry"),
        (("services", "ray-worker", "depends_on", "ray-head"), "conditon"),
        (("secrets", "api_keys"), "path"),
        (("volumes", "runs"), "drivr"),
    ],
)
def test_an_unknown_key_fails(place: tuple[str, ...], key: str) -> None:
    content = content_of()
    inner = content
    for name in place:
        inner = inner[name]
    inner[key] = "x"
    with pytest.raises(ValidationError, match=rf"(?s){key}.*Extra inputs are not permitted"):
        ComposeFile.model_validate(content)


def test_only_the_image_api_is_published_beyond_loopback() -> None:
    published = {name: service.ports for name, service in FILE.services.items() if service.ports}
    assert published == {"ray-head": ["127.0.0.1:8265:8265"], "mlflow": ["127.0.0.1:5000:5000"], "serve": ["8000:8000"]}


def test_the_public_service_neither_holds_nor_reaches_what_runs_code() -> None:
    serve = FILE.services["serve"]
    assert serve.secrets == ["api_keys"]
    assert not any(name.startswith("RAY_AUTH") for name in serve.environment)
    assert not set(serve.networks) & set(FILE.services["ray-head"].networks)
    assert serve.volumes == ["runs:/runs:ro"]


def test_ray_asks_for_the_token_everywhere_and_no_secret_is_in_an_environment() -> None:
    for name in RAY:
        service = FILE.services[name]
        assert service.secrets == ["ray_auth_token"]
        assert service.environment["RAY_AUTH_MODE"] == "token"
        assert service.environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token"
    for service in FILE.services.values():
        assert not [key for key in service.environment if key.endswith(("TOKEN", "KEY", "KEYS", "PASSWORD", "SECRET"))]


def test_secret_files_are_ignored_by_git_and_never_reach_the_builder() -> None:
    for secret in FILE.secrets.values():
        answer = subprocess.run(["git", "check-ignore", "--quiet", secret.file], cwd=ROOT, check=False)
        assert answer.returncode == 0, secret.file
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in patterns
    assert not [pattern for pattern in patterns if pattern.startswith("!deploy")]


def test_what_a_service_names_exists() -> None:
    for name, service in FILE.services.items():
        assert {volume.split(":")[0] for volume in service.volumes} <= set(FILE.volumes), name
        assert set(service.networks) <= set(FILE.networks), name
        assert set(service.secrets) <= set(FILE.secrets), name
        assert set(service.depends_on) <= set(FILE.services), name
        assert (ROOT / service.build.dockerfile).is_file(), name
        for dependency in service.depends_on:
            assert set(service.networks) & set(FILE.services[dependency].networks), f"{name} cannot reach {dependency}"


def test_workers_are_scaled_by_number() -> None:
    assert read(FLASHDMD_WORKERS="5").services["ray-worker"].deploy.replicas == 5
    assert not FILE.services["ray-worker"].ports, "a published port exists once per machine"


def test_each_target_has_an_image_of_its_own() -> None:
    for target in ("cpu", "cuda"):
        for service in read(FLASHDMD_TARGET=target).services.values():
            assert (service.build.target, service.image) == (target, f"flashdmd-ray:{target}")


def test_the_gpu_file_gives_all_gpus_to_one_worker_and_the_service() -> None:
    extra = content_of(ROOT / "deploy/docker-compose.gpu.yml")
    assert set(extra) == {"services"}
    base = content_of()
    for name, changes in extra["services"].items():
        base["services"][name] |= changes
    merged = ComposeFile.model_validate(base)
    for name in ("ray-worker", "serve"):
        deploy = merged.services[name].deploy
        assert deploy.resources is not None, name
        assert deploy.replicas == 1, name
