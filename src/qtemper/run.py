"""RunDir: everything that commands exchange on disk."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from qtemper.config import Experiment, from_json, to_dict, to_json
from qtemper.environment import environment
from qtemper.errors import CheckpointError, ConfigError, InUseError
from qtemper.files import digest, write_atomically
from qtemper.train.snapshot import differences, shorten
from qtemper.weights import save_tensors

try:
    import fcntl
except ModuleNotFoundError:
    CAN_LOCK = False  # on Windows: there, nothing keeps two runs apart
else:
    CAN_LOCK = True


@final
@dataclass(frozen=True)
class RunDir:
    """A run on disk.

    | file | content |
    |---|---|
    | `config.json` | the experiment |
    | `environment.json` | versions, CPU flags or GPU, commit, seed, data directory, sha256 of the float checkpoint |
    | `metrics.jsonl` | one JSON object every few steps and one an epoch |
    | `float.safetensors` | the float network that quantization started from |
    | `checkpoints/` | see `qtemper.train.state` |
    | `result.json` | float, calibrated and trained accuracy; those of the stages |
    | `stages/W8A8/` ... | a run directory for each stage of a progressive schedule |
    | `final.safetensors` | the trained network, its experiment in the metadata |
    | `.lock` | held by the process that trains into the directory; gone when it ends |
    """

    path: Path

    @classmethod
    def dated(cls, name: str) -> RunDir:
        """`runs/<date>-<time>-<name>`, not yet created."""
        return cls(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run.

        Raises:
            CheckpointError: there is no run at that path.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is no run directory (it has no config.json); give the path `train` printed.")
        return cls(path)

    def create(self, experiment: Experiment, data: Path | None, init: Path | None = None) -> None:
        """Make the directory and write configuration and environment.

        Args:
            experiment: what the run does.
            data: the data set's directory.
            init: the float checkpoint that it starts from.

        Raises:
            CheckpointError: the directory has content already, or cannot be written.
        """
        self.make()
        # A creation that was killed left no config.json, which is written last: nothing of a run is lost.
        left = {".lock", ".tmp-environment.json", "environment.json", ".tmp-config.json"}
        if any(path.name not in left for path in self.path.iterdir()):
            raise CheckpointError(
                f"{self.path} is not empty; choose another --out, or continue that run with --resume."
            )
        record = environment(experiment.seed) | {
            "data": None if data is None else str(data.resolve()),
            "init_sha256": None if init is None else digest(init),
        }
        write_atomically(self.path / "environment.json", (json.dumps(record, indent=2) + "\n").encode())
        write_atomically(self.path / "config.json", to_json(experiment).encode())

    def make(self) -> None:
        """Make the directory if it is not there.

        Raises:
            CheckpointError: it cannot be made, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; choose another --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot create {self.path}: {error.strerror or error}; choose another --out."
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training into this directory, which is made if it is not there.

        The kernel holds the lock and lets go of it when the process dies, however it dies: there is no stale lock.
        Only one process of a distributed training takes it, the one that writes.

        Raises:
            InUseError: another process trains into this directory.
            CheckpointError: it cannot be written.
        """
        self.make()
        if not CAN_LOCK:
            yield
            return
        path = self.path / ".lock"
        try:
            descriptor = _acquire(path)
        except BlockingIOError:
            raise InUseError(
                f"{self.path} is in use by {_holder(path)}; wait until it ends, or choose another --out."
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot lock {path}: {error.strerror or error}; choose another --out.") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is still held: see `_acquire`
            _LOCKS.discard(descriptor)
            os.close(descriptor)

    def require_same(self, experiment: Experiment) -> None:
        """Refuse to continue the run with another experiment than its own.

        Raises:
            ConfigError: with the first settings that differ, as `path: old, now new`.
        """
        found = differences(to_dict(self.experiment()), to_dict(experiment))
        if found:
            raise ConfigError(
                f"{self.path} was started with other settings ({shorten(found)}); resume with the recipe and --set it "
                "was started with (its config.json shows them), or start a new run."
            )

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained network."""
        return self.path / "final.safetensors"

    @property
    def float_weights(self) -> Path:
        """The float network that quantization started from."""
        return self.path / "float.safetensors"

    def stage(self, name: str) -> RunDir:
        """The run of a stage."""
        return RunDir(self.path / "stages" / name)

    @property
    def finished(self) -> bool:
        """Whether the trained network and its accuracy are there."""
        return self.final.exists() and "top1" in self.read_result()

    def experiment(self) -> Experiment:
        """The experiment in `config.json`.

        Raises:
            ConfigError: the file is damaged.
        """
        return from_json((self.path / "config.json").read_bytes(), source=str(self.path / "config.json"))

    def data_directory(self) -> Path | None:
        """The data directory of the training, if it is recorded and still there."""
        try:
            recorded = json.loads((self.path / "environment.json").read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Path(recorded) if recorded and Path(recorded).is_dir() else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        write_atomically(self.path / "result.json", (json.dumps(result, indent=2) + "\n").encode())

    def read_result(self) -> dict[str, Any]:
        """What `write_result` wrote, or nothing."""
        path = self.path / "result.json"
        try:
            return dict(json.loads(path.read_bytes())) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it to go on without the accuracies that it recorded."
            ) from None

    def write_float(self, model: nn.Module) -> None:
        """Write `float.safetensors`."""
        save_tensors(self.float_weights, dict(model.state_dict()), {})

    def write_final(self, model: nn.Module, experiment: Experiment) -> None:
        """Write `final.safetensors`, with the experiment in its metadata."""
        save_tensors(self.final, dict(model.state_dict()), {"experiment": to_json(experiment)})


_LOCKS: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock of `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file after we opened it: then what we hold keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                _LOCKS.add(descriptor)
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Who holds a lock, as far as the file tells."""
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


def _forget_locks() -> None:
    """In a forked child (a data loader's worker): the lock is the parent's, and must not outlive it."""
    for descriptor in _LOCKS:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
