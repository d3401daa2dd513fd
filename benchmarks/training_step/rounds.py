"""The parent: starts one worker for each contestant, and goes through the rounds, one contestant at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.training_step.contestants import CONTESTANTS
from benchmarks.training_step.setup import Setup
from benchmarks.training_step.statistics import order

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
"""Made by `make peers`."""

NO_FAST = {"QTEMPER_FAST": "0"}
"""What `--no-fast` adds to the environment of our own contestants: the one place that knows how it is done."""

KEEP = str(2**30)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP, "MALLOC_TOP_PAD_": KEEP}
"""The settings of `qtemper.train.allocator`, as variables: every process has them from its first allocation on, those
without qtemper's engine too. Without them all contestants spend a good part of a step on page faults."""

START_LIMIT, VISIT_LIMIT = 1200.0, 600.0
"""Seconds after which a worker that does not answer has failed: to get ready (compilation included), and later."""


class WorkerError(Exception):
    """A worker cannot go on; the message is for the table."""


class Worker:
    """A contestant's process."""

    def __init__(self, key: str, setup: Setup, *, fast: bool = True, environment: dict[str, str] | None = None) -> None:
        contestant = CONTESTANTS[key]
        python = Path(sys.executable)
        if contestant.home == "peer":
            if not PEERS_PYTHON.exists():
                raise WorkerError("not installed: no .venv-peers (make peers)")
            python = PEERS_PYTHON
        request = json.dumps({"contestant": key, "setup": dataclasses.asdict(setup)})
        self.log = tempfile.NamedTemporaryFile("w+", prefix="training-step-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.training_step.worker", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env=_environment(setup, NO_FAST if contestant.home == "ours" and not fast else {}) | (environment or {}),
            start_new_session=True,  # to be ended together with the compilers that it started (but prepare_compiler's)
        )

    def begin(self) -> dict[str, Any]:
        """What it measured while it got ready."""
        return self._answer(START_LIMIT)

    def ask(self, **action: Any) -> dict[str, Any]:
        """Have it do something."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has said why, or it has died: `_answer` tells
            self.process.stdin.write((json.dumps(action) + "\n").encode())
            self.process.stdin.flush()
        return self._answer(VISIT_LIMIT)

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        # One line answers one request, so nothing is left in the buffer that select() would not see.
        if not select.select([self.process.stdout], [], [], limit)[0]:
            raise WorkerError(f"no answer within {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"died: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "missing" in found:
            raise WorkerError(f"not installed: {found['missing']}")
        if "error" in found:
            raise WorkerError(f"failed: {found['error']}")
        return found

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        code = self.process.poll()
        return lines[-1][:200] if lines else f"exit code {code}"

    def close(self) -> None:
        """End it, and whatever it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _environment(setup: Setup, extra: dict[str, str]) -> dict[str, str]:
    threads = str(setup.threads)
    return {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "PYTHONWARNINGS": "ignore",
        "NNCF_CI": "1",  # its own switch for no telemetry
        # It compiles C++ on first use; a minute, its default, may not do. A build that was killed leaves a lock that
        # every later one waits for: here `make clean` removes it.
        "NNCF_EXTENSION_LOAD_TIMEOUT": "300",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv-peers" / "extensions"),
        **extra,
    }


@contextlib.contextmanager
def worker(key: str, setup: Setup, **options: Any) -> Iterator[Worker]:
    """A worker that is gone afterwards."""
    made = Worker(key, setup, **options)
    try:
        yield made
    finally:
        made.close()


def race(
    keys: list[str],
    setup: Setup,
    *,
    rounds: int,
    steps: int,
    fast: bool,
    say: Callable[[str], None],
    together: bool = False,
) -> dict[str, dict[str, Any]]:
    """All contestants' measurements: what `Worker.begin` says and `visits`, one for each round; or `failure`.

    One contestant after the other gets ready, so that each has the machine for itself while it compiles; or all
    `together`, whose first steps are then not comparable.
    """
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        waiting: dict[str, Worker] = {}
        for key in keys if together else []:
            with contextlib.suppress(WorkerError):  # which the loop below meets again
                waiting[key] = stack.enter_context(worker(key, setup, fast=fast))
        for key in keys:
            try:
                started = waiting.get(key) or stack.enter_context(worker(key, setup, fast=fast))
                results[key] = {**started.begin(), "visits": []}
                workers[key] = started
                say(f"{key}: first step {results[key]['first_step_seconds']:.1f} s")
            except WorkerError as failure:
                results[key] = {"failure": str(failure)}
                say(f"{key}: {failure}")
        for number in range(rounds):
            for key in order(list(workers), number) if workers else []:
                try:
                    results[key]["visits"].append(workers[key].ask(steps=steps))
                except WorkerError as failure:
                    results[key] = {"failure": str(failure)}
                    workers.pop(key).close()
                    say(f"{key}: {failure}")
            say(f"round {number + 1} of {rounds}")
    return results
