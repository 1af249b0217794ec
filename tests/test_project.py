"""The project's own promises: the lock, the import rules, the targets a newcomer needs."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "constraints.txt").read_text()


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_holds_versions_only():
    assert not re.search(r"https?:|file:|@ |--(index|extra|find)|(^|\s)/", LOCK), "no registry address and no path"
    for line in LOCK.splitlines():
        assert re.match(r"[A-Za-z0-9._-]+==[^\s;]+( ; .+)?$", line), line


def test_every_dependency_has_a_floor_and_is_locked_at_or_above_it():
    from packaging.requirements import Requirement

    locked = [re.match(r"(\S+)==(\S+)", line).groups() for line in LOCK.splitlines()]
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: a floor, no pin"
        versions = [version for name, version in locked if normal(name) == normal(requirement.name)]
        assert versions, f"{requirement} is not locked"
        assert all(requirement.specifier.contains(version) for version in versions), (
            f"{requirement}: locked at {versions}"
        )


@pytest.mark.parametrize("target", ["install", "demo", "serve", "test", "check"])
def test_make_knows_the_target(target):
    answer = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_ci_runs_check_and_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100, "executable"
    assert re.findall(r"^make \w+$", script.read_text(), re.MULTILINE) == ["make check", "make test"]


FORBIDDEN_IMPORTS = {
    "layers": ("losses/planted.py", "from flashdmd_ray import driver\n"),
    "no cycles": ("data/precomputed.py", "from flashdmd_ray.data import precompute\n"),
    "only runtime/": ("roles/planted.py", "def f():\n    import ray\n"),
    "only engine/": ("models/planted.py", "import deepspeed\n"),
    "nothing imports jobs": ("roles/planted_too.py", "import jobs\n"),
    "configuration, plan and tracking": ("config/planted.py", "import torch\n"),
}


@pytest.mark.parametrize("violated", [False, True])
def test_import_rules_hold_and_catch_violations(tmp_path, violated):
    """The rules pass on the package as it is, and each of them fails on a copy with one forbidden import planted for each."""
    copy = tmp_path / "flashdmd_ray"
    shutil.copytree(ROOT / "flashdmd_ray", copy, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, text in FORBIDDEN_IMPORTS.values() if violated else ():
        with (copy / file).open("a") as module:
            module.write(text)
    # As `lint-imports` does, but with the copy first on the path.
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    words = " ".join(answer.stdout.split())
    rules = len(FORBIDDEN_IMPORTS)
    expected = f"Contracts: {0 if violated else rules} kept, {rules if violated else 0} broken."
    assert expected in words, words + answer.stderr
    for rule in FORBIDDEN_IMPORTS:
        assert re.search(rf"{rule}[^.]*? {'BROKEN' if violated else 'KEPT'}", words), rule


def test_every_folder_of_the_package_is_a_regular_package():
    """Without __init__.py a folder would be missing from a built package, and the import rules would not see it."""
    folders = {path.parent for path in (ROOT / "flashdmd_ray").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_no_machine_path_or_public_address_in_tracked_text():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if not path.is_file() or path.suffix not in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json"}:
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/home/\w+|/ro[o]t/|/wor[k]/", text), f"{name} names a path of some machine"
