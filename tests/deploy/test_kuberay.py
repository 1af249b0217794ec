"""deploy/kuberay: known fields only, one Ray version everywhere, pods without rights, names that agree with the image and the guide."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import kuberay
import pytest
import yaml
from dockerfile import parse
from pydantic import ValidationError

from flashdmd_ray.config import load_config

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy/kuberay").glob("*.yaml"))
LOCKED_RAY = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
GUIDE = (ROOT / "deploy/README.md").read_text()


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def resource(request: pytest.FixtureRequest) -> kuberay.Resource:
    return kuberay.read(request.param)


def test_the_manifests_are_those_of_the_guide() -> None:
    assert {f"kuberay/{path.name}" for path in MANIFESTS} == set(
        re.findall(r"^\| `(kuberay/\w+\.yaml)`", GUIDE, re.MULTILINE)
    )


def test_ray_is_the_locked_version(resource: kuberay.Resource) -> None:
    assert resource.cluster().rayVersion == LOCKED_RAY


def test_all_nodes_run_one_image_that_the_guide_builds(resource: kuberay.Resource) -> None:
    (image,) = {container.image for pod in resource.cluster().pods() for container in pod.containers}
    assert f"--tag {image} ." in GUIDE


def test_pods_run_as_the_user_of_the_image(resource: kuberay.Resource) -> None:
    (user,) = parse(ROOT / "deploy/Dockerfile").all("cpu", "USER")
    for pod in resource.cluster().pods():
        assert str(pod.securityContext.runAsUser) == str(pod.securityContext.fsGroup) == user


def test_the_head_computes_nothing_and_pods_get_what_they_may_use(resource: kuberay.Resource) -> None:
    assert resource.cluster().headGroupSpec.rayStartParams["num-cpus"] == "0"
    for pod in resource.cluster().pods():
        for container in pod.containers:
            assert container.resources.requests == container.resources.limits


def test_secrets_and_claims_are_those_of_the_guide(resource: kuberay.Resource) -> None:
    cluster = resource.cluster()
    assert f"create secret generic {cluster.authOptions.secretName} --from-literal=auth_token=" in GUIDE
    for pod in cluster.pods():
        for volume in pod.volumes:
            if volume.persistentVolumeClaim is not None:
                assert f"metadata: {{name: {volume.persistentVolumeClaim.claimName}}}" in GUIDE
            if volume.secret is not None:
                assert f"create secret generic {volume.secret.secretName} " in GUIDE


def test_the_job_runs_a_preset_of_the_image() -> None:
    job = kuberay.read(ROOT / "deploy/kuberay/rayjob.yaml")
    assert isinstance(job, kuberay.RayJob)
    program, command, preset, flag, *settings = shlex.split(job.spec.entrypoint)
    assert (program, command, flag) == ("flashdmd", "train", "--set")
    config = load_config(preset, settings)
    mounts = {mount.mountPath for container in job.cluster().pods()[0].containers for mount in container.volumeMounts}
    assert str(config.run.dir) in mounts, "a retry is a new cluster: the run must be on the volume"


def containers_of(content: Any) -> list[Any]:
    return content["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("key", ["backOffLimit", "entryPoint"])
def test_an_unknown_key_fails(key: str) -> None:
    content = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    kuberay.validate(content)
    content["spec"][key] = 1
    with pytest.raises(ValidationError, match=rf"{key}\n.*Extra inputs"):
        kuberay.validate(content)
    del content["spec"][key]
    containers_of(content)[0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ValidationError, match="allowPrivilegeEscalation"):
        kuberay.validate(content)
