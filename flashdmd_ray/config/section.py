"""What every section of the configuration is made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Timestep = Annotated[int, Field(strict=True, ge=0, le=999)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


_MAY_CHANGE = "a resumed run may change it"
_T = TypeVar("_T")
MayChange = Annotated[_T, _MAY_CHANGE]
"""Type of a setting, or of a whole section, that a resumed run may set anew: it changes nothing of what a step computes but rounding."""


def changeable_keys(kind: type[Section]) -> tuple[str, ...]:
    """The dotted keys of a configuration that are marked `MayChange`: single settings, and sections with all that is in them."""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        if _MAY_CHANGE in field.metadata:
            keys.append(name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += [f"{name}.{key}" for key in changeable_keys(field.annotation)]
    return tuple(keys)


def suggestion(word: str, known: Sequence[str]) -> str:
    """', did you mean ...?' for the nearest known word, else ''."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""
