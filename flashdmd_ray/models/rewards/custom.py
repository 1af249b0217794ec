"""A user's own reward: a class with one method, named by its import path."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.custom_class import import_class
from flashdmd_ray.models.rewards.base import BatchedReward
from flashdmd_ray.run.messages import one_line, typed_line


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """Whatever the user's code sets for the whole process is as before at the end: other networks compute in it too."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


class Custom(BatchedReward):
    """reward = own.score(images, texts). The returned values are checked at every call."""

    name = "custom"

    def __init__(self, own: Any, path: str) -> None:
        super().__init__()
        self.own = own
        """Registered as a part of this module when it is one, so that it moves along."""
        self.path = path

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """An object of the class that `settings.path` names, built with `settings.options` as keyword arguments.

        Raises ValueError, one line, when it cannot be imported or built, or has no method score(images, texts).
        """
        path, options = settings.path, settings.options
        with _torch_settings_kept():
            own_class = import_class(path, options)
            try:
                own = own_class(**copy.deepcopy(dict(options)))
            except (Exception, SystemExit) as error:
                raise ValueError(f"{path} cannot be built with options {options}: {typed_line(error)}") from error
        return cls(own, path)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the object too, if it can be moved."""
        if not isinstance(self.own, nn.Module) and hasattr(self.own, "to"):
            self.own.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,). Raises ValueError when the class returns something else than one number for each image.

        It is lent copies: whatever it does to them, the rewards after it see the same pixels.
        """
        try:
            with _torch_settings_kept():
                answer = self.own.score(images.clone(), list(texts))
        except SystemExit as error:  # it would end the process of the training
            raise RuntimeError(f"{self.path}.score called sys.exit") from error
        if inspect.iscoroutine(answer):
            answer.close()
        try:
            scores = torch.as_tensor(answer)
            if scores.is_complex():
                raise TypeError
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"{self.path}.score returned {one_line(repr(answer), 80)}, a {type(answer).__name__}: it must return one number "
                f"for each of the {len(texts)} images, as a tensor, an array or a list"
            ) from None
        if scores.shape != (len(texts),):
            raise ValueError(
                f"{self.path}.score returned shape {tuple(scores.shape)} for {len(texts)} images: it must be ({len(texts)},)"
            )
        return scores.float().to(images.device).clone()  # the class may write its next answer into the same memory
