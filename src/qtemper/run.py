"""RunDir: everything that commands exchange on disk, and the environment a number comes from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from qtemper.config import Experiment, from_json, to_json
from qtemper.errors import CheckpointError
from qtemper.train.state import save_tensors, write_atomically

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm")
"""CPU features that decide speed, and in part exactness, of low-bit kernels."""


@final
@dataclass(frozen=True)
class RunDir:
    """A run on disk.

    | file | content |
    |---|---|
    | `config.json` | the experiment |
    | `environment.json` | versions, CPU flags or GPU, commit, seed, data directory |
    | `metrics.jsonl` | one JSON object every few steps and one an epoch |
    | `float.safetensors` | the float network that quantization started from |
    | `checkpoints/` | see `qtemper.train.state` |
    | `result.json` | float, calibrated and trained accuracy |
    | `final.safetensors` | the trained network, its experiment in the metadata |
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

    def create(self, experiment: Experiment, data: Path | None) -> None:
        """Make the directory and write configuration and environment.

        Raises:
            CheckpointError: the directory has content already, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; choose another --out.")
        if self.path.exists() and any(self.path.iterdir()):
            raise CheckpointError(
                f"{self.path} is not empty; choose another --out, or continue that run with --resume."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot create {self.path}: {error.strerror or error}; choose another --out."
            ) from None
        record = environment(experiment.seed) | {"data": None if data is None else str(data.resolve())}
        write_atomically(self.path / "environment.json", (json.dumps(record, indent=2) + "\n").encode())
        write_atomically(self.path / "config.json", to_json(experiment).encode())

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


def environment(seed: int) -> dict[str, Any]:
    """Where a number comes from: versions, processor, GPU, commit, seed."""
    return {
        "qtemper": importlib.metadata.version("qtemper"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_flags": cpu_flags(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def cpu_flags() -> list[str]:
    """Those of `CPU_FLAGS` that this processor has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in CPU_FLAGS if flag in words]


def commit() -> str | None:
    """The commit of the source tree the package runs from, with `-dirty`; None for an installed package."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        out = subprocess.run(git, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
