"""Networks and what they need to be loaded: the teacher families behind `Denoiser`, SAM, the discriminator, reward models.

Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from flashdmd_ray.catalog.families import FAMILIES

if TYPE_CHECKING:
    from flashdmd_ray.models.family import Family


def family_class(name: str) -> type[Family]:
    """The class of the family called `name` in the configuration."""
    module, _, attribute = FAMILIES[name].adapter.partition(":")
    found: type[Family] = getattr(import_module(module), attribute)
    return found
