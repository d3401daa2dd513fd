"""How a run is executed: as a process of this machine here, as a cluster's job in `slurm`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from qtemper.compare.grid import Run

OF_SEVERAL = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
"""What torchrun or Slurm tell one of several processes; a run is one alone, and would wait for the others."""


@dataclass(frozen=True)
class Options:
    """What all runs share.

    Attributes:
        root: the comparison's directory.
        data: directory of the data set.
        init: float checkpoint.
        threads: of torch in each run.
    """

    root: Path
    data: Path | None = None
    init: Path | None = None
    threads: int = 1


class Job(ABC):
    """A run that was started."""

    @abstractmethod
    def poll(self) -> int | None:
        """The training's exit code; None while it waits for its turn or runs."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to write a checkpoint and end; `poll` says when it has."""

    @abstractmethod
    def kill(self) -> None:
        """End it now; it goes on from the checkpoint before."""

    @abstractmethod
    def seconds(self) -> float:
        """How long it has trained; waiting for a turn does not count."""


class Launcher(ABC):
    """Starts runs."""

    @abstractmethod
    def start(self, run: Run) -> Job:
        """Start a run, or continue it from its newest checkpoint."""


@final
class LocalProcesses(Launcher):
    """Every run is a process of this machine; where there are several GPUs, on the one with the fewest of them.

    Args:
        options: what all runs share.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.gpus = visible_gpus()
        self.started: list[_Process] = []

    def start(self, run: Run) -> Job:
        """See `Launcher`."""
        self.started = [process for process in self.started if process.poll() is None]
        used = [process.gpu for process in self.started]
        gpu = min(self.gpus, key=used.count, default=None)
        self.started.append(_Process(run, self.options, gpu))
        return self.started[-1]


@final
class _Process(Job):
    def __init__(self, run: Run, options: Options, gpu: str | None) -> None:
        self.popen = spawn(run, options, gpu)
        self.gpu = gpu
        self.started = time.monotonic()

    def poll(self) -> int | None:
        return self.popen.poll()

    def stop(self) -> None:
        self.popen.terminate()

    def kill(self) -> None:
        self.popen.kill()

    def seconds(self) -> float:
        return time.monotonic() - self.started


def log_path(run: Run, root: Path) -> Path:
    """The file that takes what a run's processes print."""
    return root / "logs" / f"{run.directory(root).name}.log"


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; no context is made on any."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else [name.strip() for name in named.split(",")][:count]


def spawn(run: Run, options: Options, gpu: str | None = None) -> subprocess.Popen[bytes]:
    """The run's training as a child of this process, its output added to the run's log.

    Args:
        run: what to train.
        options: what all runs share.
        gpu: the only one that it sees, if not all.
    """
    directory = run.directory(options.root)
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qtemper.cli", "train", run.recipe, "--out", str(directory)]
    for assignment in run.assignments:
        command += ["--set", assignment]
    for name, path in (("--data", options.data), ("--init", options.init)):
        if path is not None:
            command += [name, str(path)]
    if (directory / "config.json").exists():
        command.append("--resume")
    environment = {name: value for name, value in os.environ.items() if name not in OF_SEVERAL}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = log_path(run, options.root)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_signals,
        )


def _signals() -> None:
    """In the child, before its program starts.

    On Linux: SIGTERM when its parent dies, even by SIGKILL, so that it writes a checkpoint and ends. Slurm's warning
    before a job's time is up goes to every process of the job; it is for the parent, and by default it would kill.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
