"""The command `flashdmd config`: explain keys, or print a whole configuration.

Exit codes: 0 done, 2 no such key, or a configuration that is wrong.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from flashdmd_ray.config import dump_config, load_as, suggestion
from flashdmd_ray.reference.settings import JOBS, Setting, settings_of
from flashdmd_ray.run.command_line import add_set, run_command

WIDTH = 100


def config_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd config [KEY ...]` or `flashdmd config show [CONFIG]`; returns the exit code."""
    words = list(arguments or ())
    if words[:1] == ["new"]:
        from flashdmd_ray.reference.start import new_command

        return new_command(words[1:])
    if words[:1] == ["show"]:
        return _show(words[1:])
    parser = argparse.ArgumentParser(
        prog="flashdmd config",
        description="Explain settings: type, bounds, default and meaning.",
        epilog="`flashdmd config new` writes a configuration to start from, `flashdmd config show` prints all of one.",
    )
    parser.add_argument(
        "keys", metavar="KEY", nargs="*", help="a setting or a section, e.g. preference.beta (default: all sections)"
    )
    options = parser.parse_args(words)

    def work() -> int:
        print("\n\n".join("\n".join(explain(key)) for key in options.keys or [""]))
        return 0

    return run_command(work)


def _show(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flashdmd config show", description="Print every setting of a configuration, defaults included."
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="demo", help="a YAML file or a preset's name")
    parser.add_argument("--job", choices=["train", "reward train"], default="train", help="whose configuration it is")
    add_set(parser, "steps=400")
    options = parser.parse_args(arguments)

    def work() -> int:
        print(dump_config(load_as(JOBS[options.job], options.config, options.set)), end="")
        return 0

    return run_command(work)


def explain(key: str) -> list[str]:
    """Lines about a setting, or a section and what is in it; '' is all of `flashdmd train`. Raises ValueError for an unknown key."""
    every = {job: settings_of(section) for job, section in JOBS.items()}
    if not key:
        return _listed([one for one in every["train"] if "." not in one.key])
    said: dict[tuple[str, ...], list[str]] = {}
    for job, settings in every.items():
        found = next((one for one in settings if _matches(one.key, key)), None)
        if found is not None:
            inner = [one for one in settings if one.key.startswith(f"{found.key}.")]
            said.setdefault((*_one(found), *_listed(inner)), []).append(job)
    if not said:
        known = list(dict.fromkeys(one.key for settings in every.values() for one in settings))
        last = [one for one in known if one.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        meant = f", did you mean {' or '.join(last[:3])}?" if last else suggestion(key, known)
        raise ValueError(f"{key}: unknown key{meant}")
    several = len(said) > 1 or list(said.values()) == [["serve"]]
    return [
        line
        for lines, jobs in said.items()
        for line in ([f"# of flashdmd {', '.join(jobs)}"] if several else []) + list(lines)
    ]


def _matches(known: str, key: str) -> bool:
    """True for the key itself, with numbers and names where the reference says N and NAME."""
    parts, given = known.split("."), key.split(".")
    return len(parts) == len(given) and all(
        one in (other, "NAME") or (one == "N" and other.isdecimal()) for one, other in zip(parts, given, strict=True)
    )


def _one(setting: Setting) -> list[str]:
    default = f"; default {setting.default}" if setting.default else "" if setting.is_section else "; must be given"
    meaning = textwrap.wrap(setting.described, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return [f"{setting.key}: {setting.kind}{default}", *meaning]


def _listed(settings: Sequence[Setting]) -> list[str]:
    """One line for each setting: key, default and the first sentence."""
    if not settings:
        return []
    width = max(len(one.key) for one in settings)
    lines = []
    for one in settings:
        first = one.meaning.split(". ")[0].rstrip(".")
        value = f"{one.default}: " if one.default and not one.is_section else ""
        lines.append(
            textwrap.shorten(
                f"  {one.key:<{width}}  ".replace(" ", "\0") + value + first, WIDTH + 20, placeholder=" ..."
            )
        )
    return [line.replace("\0", " ") for line in lines]
