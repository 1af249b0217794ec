"""The shell blocks of documentation pages, as commands that tests run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- commands: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block. language: "" where none is given. mark: what the comment in the line above says of its commands, or None."""

    page: Path
    line: int
    language: str
    mark: str | None
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command, without comments; lines that end in a backslash go on."""
        lines = re.sub(r"\\ *(#.*)?\n", " ", self.text).splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        mark = MARK.fullmatch(lines[opened - 1].strip()) if opened else None
        text = "\n".join(lines[opened + 1 : number]) + "\n"
        found.append(Block(page, opened + 1, lines[opened].strip().strip("`"), mark[1] if mark else None, text))
        opened = None
    return found


def flashdmd(command: list[str]) -> list[str] | None:
    """The arguments of a command of this project; None for another program."""
    return command[1:] if Path(command[0]).name == "flashdmd" else None
