"""docs/algorithm.md stays true: its functions exist, and its open points are the configuration's."""

import ast
import re
from pathlib import Path

import flashdmd_ray
from flashdmd_ray.config import Config, Section

PAGE = (Path(__file__).parents[1] / "docs" / "algorithm.md").read_text(encoding="utf-8")
PACKAGE = Path(flashdmd_ray.__file__).parent


def functions_named():
    parts = "batch|diffusion|losses|models|roles|driver"
    return sorted(set(re.findall(rf"`((?:{parts})\.[a-z_]+(?:\.[A-Za-z_0-9]+)*)`", PAGE)))


def defines(path: Path, names: list[str]) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        if not found:
            return False
        body = found[0].body
    return True


def exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:depth]).with_suffix(".py")
        if path.is_file():
            return defines(path, parts[depth:])
    return False


def open_fields(section: type[Section], prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= open_fields(field.annotation, f"{prefix}{name}.")
        elif (field.description or "").startswith("[open]"):
            found.add(prefix + name)
    return found


def test_every_function_of_the_page_exists():
    names = [name for name in functions_named() if name.count(".") >= 1]
    assert len(names) > 30
    assert [name for name in names if not exists(name)] == []
    assert not exists("diffusion.sampling.no_such_function")


def test_every_public_objective_and_sampler_is_on_the_page():
    named = set(functions_named())
    for module in (
        "losses/distribution_matching",
        "losses/denoising",
        "losses/adversarial",
        "losses/preference",
        "losses/reward_model",
        "diffusion/sampling",
    ):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        missing = {f"{module.replace('/', '.')}.{name}" for name in public} - named
        assert missing <= {
            "diffusion.sampling.timesteps_like",
            "diffusion.sampling.trailing_timesteps",
            "losses.adversarial.halves",
        }


def test_the_open_points_are_the_fields_marked_open():
    table = PAGE.split("## What the paper leaves open")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
    assert {field for row in rows for field in re.findall(r"`([a-z_.0-9]+)`", row)} == open_fields(Config)


def test_the_points_the_paper_leaves_unstated_are_open():
    """The paper leaves these unstated, so their fields say so."""
    marked = {
        "matching.timestep_range",
        "adversarial.loss",
        "adversarial.weight",
        "score.target",
        "score.ema",
        "preference.reward_timestep",
        "preference.beta",
    }
    assert marked <= open_fields(Config)
