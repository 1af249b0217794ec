"""docker-compose.yml as far as this project uses it. A key that is not here fails, so a misspelt one does too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def seconds(text: Any) -> float:
    """A duration as compose writes it: 90s, 2m."""
    match = re.fullmatch(r"(\d+)(s|m)", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no duration such as 90s")
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


Duration = Annotated[float, BeforeValidator(seconds)]


class Build(Strict):
    context: str
    dockerfile: str
    target: Literal["cpu", "cuda"]


class HealthCheck(Strict):
    test: list[str] = Field(min_length=2)
    interval: Duration
    timeout: Duration
    retries: int = Field(ge=1)
    start_period: Duration

    @property
    def command(self) -> list[str]:
        kind, *command = self.test
        assert kind == "CMD", "a command without a shell"
        return command


class Dependency(Strict):
    condition: Literal["service_healthy"]


class Device(Strict):
    driver: Literal["nvidia"]
    count: int | Literal["all"]
    capabilities: list[Literal["gpu"]]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Deploy(Strict):
    replicas: int = Field(default=1, ge=1)
    resources: Resources | None = None


class Ulimits(Strict):
    nofile: int


class Service(Strict):
    image: str
    build: Build
    command: list[str]
    init: Literal[True]
    restart: Literal["unless-stopped"]
    cap_drop: list[Literal["ALL"]]
    security_opt: list[Literal["no-new-privileges:true"]]
    healthcheck: HealthCheck
    networks: list[str]
    volumes: list[str]
    environment: dict[str, str] = {}
    secrets: list[str] = []
    ports: list[str] = []
    profiles: list[str] = []
    depends_on: dict[str, Dependency] = {}
    deploy: Deploy = Deploy()
    ulimits: Ulimits | None = None
    shm_size: str | None = Field(default=None, pattern=r"^\d+(mb|gb)$")
    stop_grace_period: Duration = 10.0


class SecretFile(Strict):
    file: str


class ComposeFile(Strict):
    name: str
    services: dict[str, Service]
    secrets: dict[str, SecretFile]
    volumes: dict[str, Strict]
    networks: dict[str, Strict]


def interpolate(content: Any, environment: dict[str, str]) -> Any:
    """`${NAME:-default}` in every string, with the variables of `environment`; any other use of `$` is an error."""
    if isinstance(content, dict):
        return {key: interpolate(value, environment) for key, value in content.items()}
    if isinstance(content, list):
        return [interpolate(value, environment) for value in content]
    if not isinstance(content, str):
        return content
    done = _VARIABLE.sub(lambda match: environment.get(match["name"]) or match["default"], content)
    assert "$" not in done, f"not of the form ${{NAME:-default}}: {content}"
    return done


def content_of(path: Path = ROOT / "docker-compose.yml", **environment: str) -> dict[str, Any]:
    """The file with variables and anchors resolved; `x-...` keys are where the anchors are defined."""
    content = {key: value for key, value in yaml.safe_load(path.read_text()).items() if not key.startswith("x-")}
    resolved: dict[str, Any] = interpolate(content, environment)
    return resolved


def read(**environment: str) -> ComposeFile:
    return ComposeFile.model_validate(content_of(**environment))
