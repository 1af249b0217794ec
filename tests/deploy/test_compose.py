"""docker-compose.yml, as docker compose reads it: what it promises about networks, users, secrets, mounts and GPUs holds."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml
from compose_file import ROOT, read
from ray.dashboard.modules.metrics import metrics_head

SERVICES = read()["services"]
RAY = ("ray-head", "ray-worker")
GPU_FILE = "deploy/docker-compose.gpu.yml"


def published(service: dict[str, Any]) -> list[tuple[str, str]]:
    return [(port.get("host_ip", "everywhere"), port["published"]) for port in service.get("ports", [])]


def mounts(service: dict[str, Any]) -> dict[str, bool]:
    """Folder in the container -> whether it can be written there."""
    return {volume["target"]: not volume.get("read_only", False) for volume in service["volumes"]}


def test_only_the_image_api_is_published_beyond_loopback() -> None:
    assert {name: published(service) for name, service in SERVICES.items() if published(service)} == {
        "ray-head": [("127.0.0.1", "8265")],
        "mlflow": [("127.0.0.1", "5000")],
        "serve": [("everywhere", "8000")],
        "prometheus": [("127.0.0.1", "9090")],
        "grafana": [("127.0.0.1", "3000")],
    }


def test_every_service_is_without_rights_and_knows_whether_it_is_healthy() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        for dependency in service.get("depends_on", {}):
            assert set(service["networks"]) & set(SERVICES[dependency]["networks"]), f"{name} cannot reach {dependency}"


def test_the_public_service_neither_holds_nor_reaches_what_runs_code() -> None:
    serve = SERVICES["serve"]
    assert [secret["source"] for secret in serve["secrets"]] == ["api_keys"]
    assert not any(name.startswith("RAY_AUTH") for name in serve["environment"])
    assert not set(serve["networks"]) & set(SERVICES["ray-head"]["networks"])
    assert mounts(serve) == {"/runs": False, "/hub": False, "/data": False}


def test_jobs_write_runs_and_the_hub_cache_and_read_data() -> None:
    for name in RAY:
        boards = {"/boards": True} if name == "ray-head" else {}
        assert mounts(SERVICES[name]) == {"/runs": True, "/hub": True, "/data": False} | boards
        assert SERVICES[name]["environment"]["HF_HOME"] == "/hub"
    (data,) = (v for v in read(FLASHDMD_DATA="/elsewhere")["services"]["serve"]["volumes"] if v["target"] == "/data")
    assert data["source"] == "/elsewhere"


def test_ray_s_dashboard_finds_prometheus_grafana_and_its_own_boards_there() -> None:
    names, grafana = SERVICES["ray-head"]["environment"], SERVICES["grafana"]
    (source,) = yaml.safe_load((ROOT / "deploy/metrics/grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert (names[metrics_head.PROMETHEUS_NAME_ENV_VAR], names[metrics_head.PROMETHEUS_HOST_ENV_VAR]) == (
        source["name"],
        source["url"],
    )
    assert names[metrics_head.GRAFANA_HOST_ENV_VAR] == "http://grafana:3000"
    assert names[metrics_head.GRAFANA_IFRAME_HOST_ENV_VAR] == "http://{}:{}".format(*published(grafana)[0])
    boards = names[metrics_head.GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR]
    providers = yaml.safe_load((ROOT / "deploy/metrics/grafana/dashboards/flashdmd.yml").read_text())["providers"]
    assert boards in [provider["options"]["path"] for provider in providers]
    assert (mounts(SERVICES["ray-head"])["/boards"], mounts(grafana)["/boards"]) == (True, False)
    for name in ("prometheus", "grafana"):
        assert set(SERVICES[name]["networks"]) & set(SERVICES["ray-head"]["networks"])


def test_ray_asks_for_the_token_everywhere_and_no_secret_is_in_an_environment() -> None:
    for name in RAY:
        assert [secret["source"] for secret in SERVICES[name]["secrets"]] == ["ray_auth_token"]
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token"
    for service in SERVICES.values():
        names = service.get("environment", {})
        assert not [name for name in names if name.endswith(("TOKEN", "KEY", "KEYS", "PASSWORD", "SECRET"))]


def test_secret_files_are_ignored_by_git_and_never_reach_the_builder() -> None:
    for secret in read()["secrets"].values():
        answer = subprocess.run(["git", "check-ignore", "--quiet", secret["file"]], cwd=ROOT, check=False)
        assert answer.returncode == 0, secret
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in patterns
    assert not [pattern for pattern in patterns if pattern.startswith("!deploy")]


def test_workers_are_scaled_by_number() -> None:
    assert read(FLASHDMD_WORKERS="5")["services"]["ray-worker"]["deploy"]["replicas"] == 5
    assert not published(SERVICES["ray-worker"]), "a published port exists once per machine"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_has_an_image_of_its_own(target: str) -> None:
    ours = [service for service in read(FLASHDMD_TARGET=target)["services"].values() if "build" in service]
    assert len(ours) == 4
    for service in ours:
        assert (service["build"]["target"], service["image"]) == (target, f"flashdmd-ray:{target}")
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_the_gpu_file_gives_all_gpus_to_one_worker_and_one_to_the_service_that_draws_on_it() -> None:
    merged = read(GPU_FILE, FLASHDMD_SERVE_GPU="3")["services"]
    devices = {
        name: merged[name]["deploy"]["resources"]["reservations"]["devices"][0] for name in ("ray-worker", "serve")
    }
    assert merged["ray-worker"]["deploy"]["replicas"] == 1
    assert devices["ray-worker"]["count"] == -1, "all of them"
    assert devices["serve"]["device_ids"] == ["3"]
    assert merged["serve"]["command"] == [*SERVICES["serve"]["command"], "replica.gpus=1"]
