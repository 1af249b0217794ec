"""A Dockerfile as instructions and stages: enough of its grammar to check what this project promises of its image."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.instructions if name == instruction]


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    """ARG before the first FROM."""
    stages: dict[str, Stage]

    def all(self, name: str, instruction: str) -> list[str]:
        """What a target gets of an instruction, by the stages it is built FROM and then by its own."""
        if name not in self.stages:
            return []
        return self.all(self.stages[name].base, instruction) + self.stages[name].all(instruction)

    def environment(self, name: str) -> dict[str, str]:
        """ENV of a target, as plain NAME=VALUE words."""
        return dict(word.split("=", 1) for text in self.all(name, "ENV") for word in text.split())


def parse(path: Path) -> Dockerfile:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, text = line.partition(" ")
        assert name in INSTRUCTIONS, f"unexpected instruction: {line}"
        if name == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", text)
            assert match, f"every stage has a name: {line}"
            stage = stages[match[2]] = Stage(match[2], match[1])
        elif stage is None:
            assert name == "ARG", line
            key, _, value = text.partition("=")
            arguments[key] = value
        else:
            stage.instructions.append((name, text))
    return Dockerfile(arguments, stages)
