"""The fields of KubeRay's ray.io/v1 resources, and of the pods in them, that deploy/kuberay uses. A key that is not here fails.

Names and the rules between them: the Go types of KubeRay 1.7 and Kubernetes' core/v1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

DNS_NAME = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metadata(Strict):
    name: str = Field(pattern=DNS_NAME, max_length=47)
    """KubeRay appends up to 16 characters to it, and a label holds 63."""


class Port(Strict):
    name: str = Field(pattern=DNS_NAME, max_length=15)
    containerPort: int = Field(gt=0, lt=65536)


class Amounts(Strict):
    cpu: str
    memory: str = Field(pattern=r"^\d+(Mi|Gi)$")
    gpu: str | None = Field(default=None, alias="nvidia.com/gpu")


class ContainerResources(Strict):
    requests: Amounts
    limits: Amounts


class Capabilities(Strict):
    drop: list[Literal["ALL"]]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class SecretKey(Strict):
    name: str
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Mount(Strict):
    name: str
    mountPath: str
    readOnly: bool = False


class Container(Strict):
    name: str
    image: str
    ports: list[Port] = []
    env: list[Variable] = []
    resources: ContainerResources
    securityContext: ContainerSecurity
    volumeMounts: list[Mount]


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(gt=0)
    fsGroup: int = Field(gt=0)
    seccompProfile: Seccomp


class Claim(Strict):
    claimName: str
    readOnly: bool = False


class MemoryFolder(Strict):
    medium: Literal["Memory"]
    sizeLimit: str


class SecretFolder(Strict):
    secretName: str


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: MemoryFolder | None = None
    secret: SecretFolder | None = None


class Pod(Strict):
    automountServiceAccountToken: Literal[False]
    securityContext: PodSecurity
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> Pod:
        names = {volume.name for volume in self.volumes}
        for container in self.containers:
            assert {mount.name for mount in container.volumeMounts} == names, container.name
        return self


class Template(Strict):
    spec: Pod


class Auth(Strict):
    mode: Literal["token"]
    secretName: str


class Group(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Group):
    groupName: str = Field(pattern=DNS_NAME)
    replicas: int
    minReplicas: int
    maxReplicas: int

    @model_validator(mode="after")
    def _bounds(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    def pods(self) -> list[Pod]:
        return [group.template.spec for group in (self.headGroupSpec, *self.workerGroupSpecs)]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: RayClusterSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Strict):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    rayClusterConfig: RayClusterSpec


class Manifest(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(Manifest):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec

    def cluster(self) -> RayClusterSpec:
        return self.spec


class RayJob(Manifest):
    kind: Literal["RayJob"]
    spec: RayJobSpec

    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterSpec


class RayService(Manifest):
    kind: Literal["RayService"]
    spec: RayServiceSpec

    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterConfig


Resource = RayCluster | RayJob | RayService


def validate(content: Any) -> Resource:
    return TypeAdapter[Resource](Annotated[Resource, Field(discriminator="kind")]).validate_python(content)


def read(path: Path) -> Resource:
    return validate(yaml.safe_load(path.read_text()))
