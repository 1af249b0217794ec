"""Building blocks of every section of settings: the base class, checked numbers, paths."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flashdmd_ray.config.addresses import hide_passwords, tracking_address, without_password

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Timestep = Annotated[int, Field(strict=True, ge=0, le=999)]


def without_variables(text: str, variable: str = r"\$(\{|[A-Za-z_])") -> str:
    """The text itself. Raises ValueError for one that only a shell would complete. variable: pattern of what a shell would replace."""
    if re.search(variable, text):
        raise ValueError(f"environment variables are not replaced in settings; write the text itself, got '{text}'")
    return text


def _expand_home(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a path")
    without_variables(text, r"(^|/)\$[A-Za-z_]|\$\{\w+\}")
    if re.match(r"[A-Za-z][\w+.-]*:/+~", text):
        raise ValueError("a ~ inside an address is not replaced; write the whole path")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder {text.split('/')[0]}; write the whole path")
    return expanded


def local_path(value: str | Path) -> Path:
    """A path of this machine as it was written, a leading ~ replaced. Raises ValueError for an address, a variable or nothing."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
        raise ValueError(
            f"must be a folder or file of this machine, got the address '{hide_passwords(str(value), str(value))}'"
        )
    return Path(_expand_home(str(value)))


PathOrName = Annotated[str, AfterValidator(_expand_home)]
"""A path of this machine, or one of the names that the setting explains: a hub id, an address, 'demo'. A leading ~ is the home folder."""
PublicUrl = Annotated[str, AfterValidator(without_password), AfterValidator(_expand_home)]
"""As `PathOrName`, an address only without a password: it is printed and stored."""
TrackingUrl = Annotated[PublicUrl, AfterValidator(tracking_address)]
"""The address of an MLflow server or database, without a password, like `PublicUrl`."""
LocalPath = Annotated[
    Path, BeforeValidator(lambda value: local_path(value) if isinstance(value, str | Path) else value)
]
"""A folder or file of this machine; a leading ~ is the home folder."""


class Section(BaseModel):
    """Base of all sections. A field whose default is a section with values of its own keeps those that are not set."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_from_defaults(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in tree}
        return {name: completed(value, defaults.get(name)) for name, value in tree.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers: Python takes them for 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and _holds(annotation, float) and not _holds(annotation, bool):
            raise ValueError(f"must be a number, got {str(value).lower()}")
        return value


def _holds(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_holds(part, kind) for part in get_args(annotation))


def completed(value: Any, default: Any) -> Any:
    """`value` with the fields that it leaves out as `default` sets them, where it is a mapping and the default is a section."""
    if not isinstance(value, Mapping) or not isinstance(default, Section):
        return value
    own = {name: getattr(default, name) for name in default.model_fields_set}
    return {**own, **{name: completed(given, own.get(name)) for name, given in value.items()}}


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
