"""Runs in processes of their own, several at once; killed at any moment, they go on where they were."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtemper.compare.grid import Run
from qtemper.compare.record import note, read
from qtemper.train.metrics import DIVERGED_EXIT

POLL = 0.5
"""Seconds between two looks at the processes."""

IN_USE = "is in use by"
"""What `RunDir.lock` says of a run whose process lives on: its scheduler was killed, and it writes its checkpoint."""

RETRIES = 3
"""Starts of a run that fails without having diverged, before it is given up."""


@dataclass(frozen=True)
class Options:
    """How runs are started.

    Attributes:
        root: the comparison's directory.
        data: directory of the data set.
        init: float checkpoint.
        jobs: processes at once.
        threads: of torch in each.
    """

    root: Path
    data: Path | None
    init: Path | None
    jobs: int
    threads: int


@dataclass
class _Process:
    run: Run
    popen: subprocess.Popen[bytes]
    started: float


def run_all(runs: list[Run], options: Options, say: Callable[[str], None]) -> None:
    """Run everything that is not done, in order; a run that fails is reported and does not stop the others.

    Raises:
        KeyboardInterrupt: after all processes have written their checkpoints.
    """
    waiting = [run for run in runs if read(run, options.root).state not in ("done", "diverged")]
    starts: dict[str, int] = {}
    active: list[_Process] = []
    try:
        while waiting or active:
            while waiting and len(active) < options.jobs:
                run = waiting.pop(0)
                starts[run.config_hash] = starts.get(run.config_hash, 0) + 1
                active.append(_Process(run, _start(run, options), time.monotonic()))
                say(f"started   {run.arm.label}, seed {run.seed}")
            time.sleep(POLL)
            for process in [p for p in active if p.popen.poll() is not None]:
                active.remove(process)
                message = _ended(process, options, say)
                if IN_USE in message:
                    starts[process.run.config_hash] -= 1
                if message and starts[process.run.config_hash] < RETRIES:
                    waiting.insert(0, process.run)
                elif message:
                    note(process.run, options.root, state="failed", seconds=0.0, message=message)
    except BaseException:
        for process in active:
            process.popen.send_signal(signal.SIGTERM)
        for process in active:
            process.popen.wait()
            note(process.run, options.root, state="started", seconds=time.monotonic() - process.started)
        raise


def _start(run: Run, options: Options) -> subprocess.Popen[bytes]:
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
    logs = options.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{directory.name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)},
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """On Linux, SIGTERM for the run when the scheduler dies, even by SIGKILL: it writes a checkpoint and ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)


def _ended(process: _Process, options: Options, say: Callable[[str], None]) -> str:
    """Write down how a run ended; returns why to start it again, or an empty text."""
    run, code = process.run, process.popen.returncode
    seconds = time.monotonic() - process.started
    what = f"{run.arm.label}, seed {run.seed}"
    log = options.root / "logs" / f"{run.directory(options.root).name}.log"
    message = next((line for line in reversed(_tail(log)) if line.strip()), f"exit code {code}")
    if code == 0:
        note(run, options.root, state="done", seconds=seconds)
        top1 = read(run, options.root).result.get("top1", float("nan"))
        say(f"done      {what}: {top1:.2f}% in {seconds:.0f} s")
        return ""
    if code == DIVERGED_EXIT:
        note(run, options.root, state="diverged", seconds=seconds, message=message)
        say(f"diverged  {what}: {message}")
        return ""
    if IN_USE in message:
        time.sleep(2)
    elif code == 2:  # bad input: starting again would not help
        note(run, options.root, state="failed", seconds=seconds, message=message)
        say(f"failed    {what}: {message}")
        return ""
    note(run, options.root, state="started", seconds=seconds, message=message)
    say(f"stopped   {what}: {message}")
    return message


def _tail(path: Path, size: int = 4096) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace").splitlines()
