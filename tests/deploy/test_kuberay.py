"""deploy/kuberay: what kubectl builds fits KubeRay's schemas, gives pods no rights, and agrees with the image and the guide."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from flashdmd_ray.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kuberay"
KUBECTL = Path(sys.executable).with_name("kubectl")
SCHEMAS = json.loads(Path(__file__).with_name("kuberay_schemas.json").read_text())
LOCKED_RAY = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
GUIDE = (ROOT / "deploy/README.md").read_text()
CLUSTERS = {"cluster": (), "job": ("rayClusterSpec",), "service": ("rayClusterConfig",)}
VARIANTS = [f"{device}-{kind}" for device in ("cpu", "gpu") for kind in CLUSTERS]


@cache
def build(folder: Path) -> list[dict[str, Any]]:
    """The resources that `kubectl apply --kustomize` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def faults(resource: dict[str, Any]) -> list[str]:
    schema = {"$ref": f"#/{resource['kind']}"} | SCHEMAS
    return [error.message for error in Draft202012Validator(schema).iter_errors(resource)]


def cluster_of(variant: str) -> dict[str, Any]:
    (resource,) = (one for one in build(FOLDER / variant) if one["kind"].startswith("Ray"))
    spec = resource["spec"]
    for key in CLUSTERS[variant.partition("-")[2]]:
        spec = spec[key]
    return dict(spec)


def pods(variant: str) -> list[dict[str, Any]]:
    cluster = cluster_of(variant)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_variants_are_those_of_the_guide() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*-*/kustomization.yaml")}
    assert folders == set(VARIANTS) == set(re.findall(r"`([cg]pu-\w+)`", GUIDE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_fits_kuberays_schemas(variant: str) -> None:
    (resource,) = build(FOLDER / variant)
    assert resource["kind"] == f"Ray{variant.partition('-')[2].title()}"
    assert faults(resource) == []
    misspelt = copy.deepcopy(resource)
    misspelt["spec"]["backOffLimit"] = 1
    (fault,) = faults(misspelt)
    assert "backOffLimit" in fault


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_run_the_image_of_the_guide_without_rights(variant: str) -> None:
    cluster = cluster_of(variant)
    assert cluster["rayVersion"] == LOCKED_RAY
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head computes nothing"
    assert f"create secret generic {cluster['authOptions']['secretName']} --from-literal=auth_token=" in GUIDE
    (user,) = re.findall(r"^USER (\d+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(variant):
        security = pod["securityContext"]
        assert str(security["runAsUser"]) == str(security["fsGroup"]) == user
        assert security["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert f"--tag {container['image']} ." in GUIDE
        assert container["image"].endswith("cuda" if variant.startswith("gpu") else "cpu")
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or f"metadata: {{name: {claim}}}" in GUIDE
            secret = volume.get("secret", {}).get("secretName")
            assert secret is None or f"create secret generic {secret} " in GUIDE


def test_only_workers_of_gpu_variants_have_gpus() -> None:
    gpus = {v: [p["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for p in pods(v)] for v in VARIANTS}
    assert gpus == {v: [None, "1" if v.startswith("gpu") else None] for v in VARIANTS}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_service_sees_the_runs_read_only(device: str) -> None:
    for pod in pods(f"{device}-service"):
        (mount,) = (one for one in pod["containers"][0]["volumeMounts"] if one["mountPath"] == "/runs")
        assert mount["readOnly"] is True


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_job_runs_a_preset_of_the_image_on_what_its_pods_have(device: str) -> None:
    (job,) = build(FOLDER / f"{device}-job")
    program, command, preset, flag, *settings = shlex.split(job["spec"]["entrypoint"])
    assert (program, command, flag) == ("flashdmd", "train", "--set")
    config = load_config(preset, settings)
    head, _ = pods(f"{device}-job")
    assert str(config.run.dir) in {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}, (
        "a retry is a new cluster: the run must be on the volume"
    )
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    learner = config.placement.learner
    assert learner.gpus * learner.workers == (group["replicas"] if device == "gpu" else 0)


def test_data_of_ones_own_is_mounted_in_every_pod(tmp_path: Path) -> None:
    """Two components, in the guide's order: `../components/data` before the job's component."""
    shutil.copytree(FOLDER, tmp_path / "kuberay")
    variant = tmp_path / "kuberay/cpu-job"
    file = variant / "kustomization.yaml"
    file.write_text(file.read_text().replace("[../components/job]", "[../components/data, ../components/job]"))
    (job,) = build(variant)
    assert faults(job) == []
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "data", "mountPath": "/data", "readOnly": True} in pod["containers"][0]["volumeMounts"]
        (volume,) = (one for one in pod["volumes"] if one["name"] == "data")
        assert f"metadata: {{name: {volume['persistentVolumeClaim']['claimName']}}}" in GUIDE


def test_the_rules_of_the_guide_are_a_resource_and_dashboards_a_config_map() -> None:
    (command,) = re.findall(r"^  (\{ printf .*?) \| kubectl apply", GUIDE, re.MULTILINE | re.DOTALL)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rules = yaml.safe_load(done.stdout)
    assert rules["spec"] == yaml.safe_load((ROOT / "deploy/metrics/rules.yml").read_text())
    *monitors, boards = sorted(build(ROOT / "deploy/metrics"), key=lambda one: one["kind"], reverse=True)
    ports = {endpoint["port"] for monitor in monitors for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    named = {port["name"] for pod in pods("cpu-service") for port in pod["containers"][0]["ports"]}
    assert ports <= named
    assert set(boards["data"]) == {path.name for path in (ROOT / "deploy/metrics/dashboards").iterdir()}
