"""Run the `qtemper` command in forked children that can be killed, starved or interrupted at an exact point.

The parent has imported torch and qtemper, so that a trial costs its training and not seconds of imports; a child runs
`qtemper.cli.main()` with the arguments that a shell would give it. Forking is safe because torch has one thread here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from qtemper import cli, pipeline  # noqa: F401 (imported before the fork)
from qtemper.errors import IN_USE_EXIT

RECIPE = "digits-w2a2-tempering"
EPOCHS, STEPS = 3, 11
"""Epochs of quantized training, after one of float training, and optimizer steps of each."""

SETTINGS = (
    "float_train.epochs=1",
    "float_train.batch_size=128",
    f"train.epochs={EPOCHS}",
    "train.batch_size=128",
    "train.log_every=4",
)
JOBS = 2
TIMEOUT = 120.0

# What the command imports only when it needs it would be imported by every child anew: half of a trial's time.
for _module in (
    "sklearn.datasets",
    "PIL.Image",
    "safetensors.torch",
    "rich._emoji_codes",
    "tyro.extras",
    "typeguard",
    "qtemper.recipes",
):
    importlib.import_module(_module)

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Trial:
    """How a child ended: its exit code (negative: the signal that killed it), what it printed, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int

    @property
    def clear(self) -> bool:
        """Whether it ended as a user's error should: one line, exit code 2 (or that of a directory in use)."""
        return self.code in (2, IN_USE_EXIT) and len(self.err.strip().splitlines()) == 1 and "Traceback" not in self.err


class Child:
    """A forked child that runs `action`; its standard streams go to files."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.logs = [tempfile.NamedTemporaryFile(prefix="faults-") for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action)
        self.code: int | None = None
        self.peak = 0

    def _run(self, action: Callable[[], object]) -> None:
        code = 1
        try:
            for descriptor, log in enumerate(self.logs, 1):
                os.dup2(log.fileno(), descriptor)
            sys.stdout, sys.stderr = (open(d, "w", closefd=False) for d in (1, 2))  # noqa: SIM115
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            torch.manual_seed(os.getpid())  # another process has other global generators
            random.seed(os.getpid())
            action()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code, self.peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss
                self.seconds = time.monotonic() - self.started
        return self.code is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal if it still runs."""
        if self.running():
            os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> Trial:
        """Wait until it ends; at the timeout it is killed."""
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.002)
        out, err = (Path(log.name).read_text(errors="replace") for log in self.logs)
        for log in self.logs:
            log.close()
        assert self.code is not None
        return Trial(self.code, out, err, self.seconds, self.peak)


def command(run: Path, *settings: str, resume: bool = False, recipe: str = RECIPE) -> list[str]:
    """Arguments of `qtemper` for a training into `run`."""
    assignments = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return ["train", recipe, "--out", str(run), *assignments, *(["--resume"] if resume else [])]


def start(arguments: Sequence[str], before: Callable[[], object] | None = None) -> Child:
    """`qtemper ARGUMENTS` in a child, in which `before` is called first."""

    def action() -> None:
        if before is not None:
            before()
        sys.argv = ["qtemper", *arguments]
        cli.main()

    return Child(action)


def continue_run(run: Path, *settings: str, before: Callable[[], object] | None = None) -> Trial:
    """What a user does after a crash: `--resume`, or the plain command where the run had not begun."""
    return start(command(run, *settings, resume=(run / "config.json").exists()), before).wait()


def digest(run: Path) -> str | None:
    """Of the final weights, or None where there are none."""
    path = run / "final.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def epochs(run: Path) -> list[dict[str, Any]]:
    """The epochs' lines of `metrics.jsonl`, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines if "epoch" in line]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for one trial."""
    path = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def parallel(function: Callable[[T], R], items: Sequence[T], jobs: int = JOBS) -> list[R]:
    """`[function(item) for item in items]`, with several trials at a time."""
    # Threads, each of which forks and waits: a child has only the thread that made it, which becomes its main thread.
    # (Forked workers that fork again hang in torch.)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, items))


def after_steps(step: int, action: Callable[[], object]) -> None:
    """In a child: call `action` right after the n-th optimizer step, those of the float training included."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done = 0

    def hook(*_: object) -> None:
        nonlocal done
        done += 1
        if done == step:
            action()

    register_optimizer_step_post_hook(hook)


def signal_self(number: int) -> Callable[[], None]:
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def limit_file_size(size: int) -> None:
    """In a child: no file may grow beyond `size` bytes, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
