"""Every change that a process makes to the files below a directory, as numbered events at which it can be killed."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Fault = Literal["before", "torn", "error"]


class FileEvents:
    """Patches Python's file functions, in a child that is about to be sacrificed; never undone.

    Events are: opening for writing, write, fsync, mkdir, rename, replace, unlink, rmdir and truncation.

    Args:
        root: what happens elsewhere does not count.
        at: number of the event at which `fault` happens, from 0; None only counts.
        fault: `before` kills with SIGKILL instead of the event, `torn` kills after half of a write, `error` lets the
            event fail with `error_number` (and those after it: a full disk stays full).
        log: file that every event's name is appended to.
        error_number: for `error`.
    """

    def __init__(
        self,
        root: Path,
        at: int | None = None,
        fault: Fault = "before",
        log: Path | None = None,
        error_number: int = errno.ENOSPC,
    ) -> None:
        self.root, self.at, self.fault, self.error_number = str(root), at, fault, error_number
        self.count = 0
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.raw_write = os.write
        self.raw_open = io.open

    def install(self) -> None:
        """Patch."""
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "truncate"):
            self._patch(name, self._path)
        for name in ("fsync", "ftruncate", "write"):
            self._patch(name, self._descriptor)
        io.open = self._open  # type: ignore[assignment]

    def event(self, name: str, path: str, data: Any = None, write: Callable[[Any], Any] | None = None) -> None:
        """Something is about to happen to `path`."""
        if not path.startswith(self.root):
            return
        number, self.count = self.count, self.count + 1
        if self.log is not None:
            self.raw_write(self.log, f"{name} {path[len(self.root) :].lstrip('/')}\n".encode())
        if self.at is None or number < self.at:
            return
        # Removing still works on a full disk.
        if self.fault == "error" and name not in ("unlink", "rmdir"):
            raise OSError(self.error_number, os.strerror(self.error_number), path)
        if self.fault != "error" and number == self.at:
            if self.fault == "torn" and write is not None:
                write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def _patch(self, name: str, find: Callable[..., str]) -> None:
        real = getattr(os, name)

        def patched(first: Any, *rest: Any, **options: Any) -> Any:
            if name == "write":
                self.event(name, find(first), rest[0], lambda part: real(first, part))
            else:
                self.event(name, find(first, **options))
            return real(first, *rest, **options)

        setattr(os, name, patched)

    @staticmethod
    def _path(path: Any, *, dir_fd: int | None = None, **_: Any) -> str:
        text = os.fspath(path)
        return text if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)  # noqa: PTH115, PTH118

    @staticmethod
    def _descriptor(descriptor: int, **_: Any) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except OSError:
            return ""

    def _open(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return self.raw_open(file, mode, *rest, **options)
        path = os.fspath(file)
        if not str(path).startswith(self.root):
            return self.raw_open(file, mode, *rest, **options)
        self.event("open", path)
        return _Watched(self, path, self.raw_open(file, mode, *rest, **options))


class _Watched:
    """A file whose writes are events, and which leaves nothing in a buffer."""

    def __init__(self, events: FileEvents, path: str, file: Any) -> None:
        self._events, self._path, self._file = events, path, file

    def write(self, data: Any) -> Any:
        def flushed(part: Any) -> Any:
            count = self._file.write(part)
            self._file.flush()
            return count

        self._events.event("write", self._path, data, flushed)
        return flushed(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._file.__exit__(*what)
