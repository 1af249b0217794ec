"""A store in memory, `troubled://`, whose operations can be held up or fail."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class TroubledFileSystem(MemoryFileSystem):
    """fail_at: the operation, counted from 1 since `reset`, that raises. Uploads wait until `gate` is set."""

    protocol = "troubled"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail_at: ClassVar[int] = 0
    operations: ClassVar[int] = 0
    gate: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def reset(cls, fail_at: int = 0) -> None:
        cls.fail_at, cls.operations = fail_at, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("troubled://", "memory://", 1))

    def _operate(self) -> None:
        type(self).operations += 1
        if self.operations == self.fail_at:
            raise OSError("the network is down")

    def put_file(self, *arguments: Any, **options: Any) -> Any:
        assert self.gate.wait(30)
        self._operate()
        return super().put_file(*arguments, **options)

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().pipe_file(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().rm_file(*arguments, **options)

    def rm(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().rm(*arguments, **options)

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().ls(*arguments, **options)

    def exists(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().exists(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self._operate()
        return super().cat_file(*arguments, **options)


fsspec.register_implementation("troubled", TroubledFileSystem, clobber=True)
