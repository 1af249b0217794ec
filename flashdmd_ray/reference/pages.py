"""docs/configuration.md and the JSON schemas for editors, made of the configuration's types: `python -m flashdmd_ray.reference.pages`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.config import PRESETS, Config, Section
from flashdmd_ray.reference.settings import JOBS, Setting, settings_of
from flashdmd_ray.reward_training.config import RewardTrainingConfig

ROOT = Path(__file__).parents[2]
_FOLDER = PRESETS["demo"].parent
SCHEMAS: dict[type[Section], Path] = {
    Config: _FOLDER / "train.schema.json",
    RewardTrainingConfig: _FOLDER / "reward_train.schema.json",
}
"""Configurations that are files -> their JSON schema, which presets name in their first line."""

_HEAD = """# Configuration: every key

Written from the configuration's types by `make reference`: change docstrings, not this page. `flashdmd config KEY`
says the same of one key, also of a list's item (`flashdmd config rewards.0.weight`).

- A configuration is a YAML file of keys that differ from the defaults, or a preset's name. `--set key=value` changes
  one key for one run.
- `[open]` marks what the paper leaves unstated.
- ↻ marks keys that a resumed run may change. All others must stay as they were.
- An editor with a YAML language server completes and explains keys in files whose first line is that of the
  [presets](../flashdmd_ray/presets).
"""


def files() -> dict[Path, str]:
    """Path in the checkout -> the text that should be there."""
    made = {path: json.dumps(schema(section)) + "\n" for section, path in SCHEMAS.items()}
    return {ROOT / "docs" / "configuration.md": page(), **made}


def schema(section: type[Section]) -> dict[str, Any]:
    """The JSON schema of a configuration file: every key is optional where a default completes its section."""
    found = section.model_json_schema()
    completed = {item["$ref"].rsplit("/", 1)[1] for item in _sections(found)}
    for name in completed:
        found["$defs"][name].pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _sections(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (found, *found["$defs"].values()):
        yield from (item for item in part.get("properties", {}).values() if "$ref" in item)


def page() -> str:
    """docs/configuration.md."""
    return "\n".join([_HEAD, *(line for job, section in JOBS.items() for line in _job(job, settings_of(section)))])


def _job(job: str, settings: Sequence[Setting]) -> Iterator[str]:
    yield from (f"## `flashdmd {job}`", "")
    yield from _table([setting for setting in settings if "." not in setting.key and not setting.is_section])
    for top in (setting for setting in settings if setting.is_section and "." not in setting.key):
        yield from (f"### {job}: {top.key}", "")
        if top.kind != "section":
            yield from (f"{_short(top.kind)}. Default:", "", "```json", top.default, "```", "")
        inner = [one for one in settings if one.key.startswith(f"{top.key}.") and one.kind != "section"]
        yield from _table(inner)


def _short(kind: str) -> str:
    return kind[0].upper() + kind[1:]


def _table(settings: Sequence[Setting]) -> Iterator[str]:
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for one in settings:
        cells = [f"`{one.key}`{' ↻' if one.may_change else ''}", one.kind, _code(one.default), one.meaning]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _code(text: str) -> str:
    return f"`{text}`" if text else "must be given"


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
