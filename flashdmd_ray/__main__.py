"""The command `flashdmd`, also as `python -m flashdmd_ray`. A command's module is imported when it is asked for: help is instant."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flashdmd_ray import __version__
from flashdmd_ray.run.output import outlive_readers

COMMANDS = {
    "train": ("training.cli:main", "distil a model into a few-step generator, with preference RL beside"),
    "evaluate": ("commands.evaluate:evaluate_command", "compare a run's student with its teacher"),
    "report": ("commands.report:report_command", "show finished runs on one HTML page, several side by side"),
    "sample": ("commands.sample:sample_command", "draw images of prompts with any pipeline of diffusers"),
    "score": ("commands.score:score_command", "judge folders of images: rewards, distances to real ones, differences"),
    "export": ("commands.export:export_command", "write a student as a diffusers pipeline, a single file or a LoRA"),
    "serve": ("serving.command:serve_command", "serve students: an images API and a page"),
    "data": ("commands.prepare_data:prepare_data_command", "check a data set, or precompute embeddings and latents"),
    "reward": {
        "train": ("reward_training.cli:train_latent_reward_command", "train a latent reward"),
        "serve": ("serving.reward_command:reward_serve_command", "serve a reward for jobs elsewhere"),
    },
    "config": (
        "reference.command:config_command",
        "explain a setting (config KEY), write a configuration (config new)",
    ),
    "doctor": ("commands.doctor:doctor_command", "report this machine, and what a configuration lacks here"),
    "scale": ("commands.scale:scale_command", "look at the pools of a running job and resize them"),
}
"""Command -> the function that runs it and what it does; a group of commands is a mapping of its own."""

Table = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first words name; returns its exit code, 2 for an unknown one."""
    outlive_readers()
    try:
        return _dispatch("flashdmd", COMMANDS, list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # while a command's module is imported
        return 130


def _dispatch(program: str, table: Table, words: Sequence[str]) -> int:
    word, rest = (words[0], words[1:]) if words else ("", ())
    if word in ("version", "--version") and table is COMMANDS:
        print(f"flashdmd-ray {__version__}, Python {sys.version.split()[0]}")
        return 0
    if word in ("", "-h", "--help", "help"):
        print(usage(program, table), file=sys.stdout if word else sys.stderr)
        return 0 if word else 2
    if word not in table:
        near = difflib.get_close_matches(word, table, n=1)
        meant = f", did you mean '{near[0]}'?" if near else ""
        print(f"error: {program} has no command '{word}'{meant}; there are {', '.join(table)}", file=sys.stderr)
        return 2
    entry = table[word]
    if isinstance(entry, Mapping):
        return _dispatch(f"{program} {word}", entry, rest)
    module, _, function = entry[0].partition(":")
    code: int = getattr(importlib.import_module(f"flashdmd_ray.{module}"), function)(rest)
    return code


def usage(program: str, table: Table) -> str:
    """The list of commands."""
    lines = [f"usage: {program} COMMAND [...]", "", "commands (each explains itself with --help):"]
    for name, entry in table.items():
        parts = entry if isinstance(entry, Mapping) else {"": entry}
        lines += [f"  {f'{name} {part}'.strip():<14}{about}" for part, (_, about) in parts.items()]
    if table is COMMANDS:
        lines.append(f"  {'version':<14}the versions of this package and of Python")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
