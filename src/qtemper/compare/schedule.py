"""Several runs at once, each written down as it ends; killed at any moment, they go on where they were."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtemper.compare.grid import Run
from qtemper.compare.launch import Job, Launcher, log_path
from qtemper.compare.record import State, note, read
from qtemper.errors import IN_USE_EXIT
from qtemper.train.metrics import DIVERGED_EXIT
from qtemper.train.signals import stop_on_signal

POLL = 0.5
"""Seconds between two looks at the runs."""

PAUSE = 2.0
"""Seconds after which a run starts again that is in use: its scheduler was killed, and it writes its checkpoint."""

RETRIES = 3
"""Starts of a run that fails without having diverged, before it is given up."""

GRACE = 20.0
"""Seconds to write a checkpoint in when time is up; a run that needs longer is killed, and repeats a little."""


class Stopped(Exception):  # noqa: N818 (an event, not an error)
    """Ctrl-C or SIGTERM: the runs have written their checkpoints and ended."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


@dataclass
class _Active:
    run: Run
    job: Job
    starts: int
    log_start: int  # size of the log, in bytes, before this start
    pruned: bool = False
    not_before: float = 0.0  # when a run in use starts again

    @property
    def what(self) -> str:
        return f"{self.run.arm.label}, seed {self.run.seed}"


class Pool:
    """The runs under way.

    Args:
        launcher: how they are started.
        root: the comparison's directory.
        jobs: how many at once.
        say: takes a line for every run that starts or ends.
    """

    def __init__(self, launcher: Launcher, root: Path, jobs: int, say: Callable[[str], None]) -> None:
        self.launcher, self.root, self.jobs, self.say = launcher, root, jobs, say
        self.active: list[_Active] = []
        self._tried: set[str] = set()

    @property
    def has_room(self) -> bool:
        """Whether one more may start."""
        return len(self.active) < self.jobs

    def holds(self, run: Run) -> bool:
        """Whether that run is under way."""
        return any(entry.run.config_hash == run.config_hash for entry in self.active)

    def tried(self, run: Run) -> bool:
        """Whether that run has been started here, be it under way or not."""
        return run.config_hash in self._tried

    def start(self, run: Run) -> None:
        """Start a run; how an earlier command's try ended no longer counts."""
        self._start(run, 1)
        self._tried.add(run.config_hash)
        note(run, self.root, state="started", seconds=0.0)

    def _start(self, run: Run, starts: int) -> None:
        log = log_path(run, self.root)
        size = log.stat().st_size if log.exists() else 0
        self.active.append(_Active(run, self.launcher.start(run), starts, size))
        self.say(f"started   {self.active[-1].what}")

    def prune(self, run: Run) -> None:
        """Ask a run to end for good, before its training does."""
        for entry in self.active:
            if entry.run.config_hash == run.config_hash and not entry.pruned:
                entry.pruned = True
                entry.job.stop()

    def collect(self) -> None:
        """Write down the runs that have ended; one that failed starts again, `RETRIES` times in all."""
        for entry in list(self.active):
            code = entry.job.poll()
            if code is None or time.monotonic() < entry.not_before:
                continue
            state, message = self._outcome(entry, code)
            in_use = state == "started" and code == IN_USE_EXIT
            if in_use and not entry.not_before:
                entry.not_before = time.monotonic() + PAUSE
                continue
            starts = entry.starts - in_use  # a start that had to wait is none
            if state == "started" and starts >= RETRIES:
                state = "failed"
            self._note(entry, state, message)
            self.active.remove(entry)
            if state == "started":
                self._start(entry.run, starts + 1)

    def stop(self, patience: float = math.inf) -> None:
        """Let all runs write a checkpoint and end.

        Args:
            patience: seconds after which a run that still goes on is killed.
        """
        until = time.monotonic() + patience
        for entry in self.active:
            entry.job.stop()
        while self.active:
            for entry in list(self.active):
                code = entry.job.poll()
                if code is not None:
                    # What was asked to end is no failure, whatever its exit code.
                    state: State = "done" if code == 0 else "diverged" if code == DIVERGED_EXIT else "started"
                    self._note(entry, state, self._last_line(entry, code) if state == "diverged" else "")
                    self.active.remove(entry)
                elif time.monotonic() > until:
                    entry.job.kill()
            time.sleep(POLL if self.active else 0)

    def _outcome(self, entry: _Active, code: int) -> tuple[State, str]:
        """How a run ended, in which `started` means that it has to start again, and what it said last."""
        message = self._last_line(entry, code)
        if code == 0:
            return "done", ""
        if code == DIVERGED_EXIT:
            return "diverged", message
        if entry.pruned:
            return "pruned", ""
        if code == 2:  # bad input: starting again would not help
            return "failed", message
        return "started", message

    def _note(self, entry: _Active, state: State, message: str) -> None:
        seconds = entry.job.seconds()
        note(entry.run, self.root, state=state, seconds=seconds, message=message)
        if state == "done":
            top1 = read(entry.run, self.root).result.get("top1", math.nan)
            message = f"{top1:.2f}% in {seconds:.0f} s"
        word = "stopped" if state == "started" else state
        self.say(f"{word:10}{entry.what}{': ' if message else ''}{message}")

    def _last_line(self, entry: _Active, code: int) -> str:
        """Of what was printed since the start; where the run is in use, the process that uses it prints there, too."""
        words = _tail(log_path(entry.run, self.root), entry.log_start)
        return next((line for line in reversed(words) if line.strip()), f"exit code {code}")


def drive(pool: Pool, turn: Callable[[], bool], stop_after: float | None = None) -> bool:
    """Run until nothing is left.

    Args:
        pool: the runs under way.
        turn: called every `POLL` seconds; starts what there is room for and returns whether more will come.
        stop_after: seconds after which the runs are asked to write checkpoints and end.

    Returns:
        False when time was up before everything had ended.

    Raises:
        Stopped: on Ctrl-C or SIGTERM, after the runs have written their checkpoints; a second Ctrl-C does not wait.
    """
    until = math.inf if stop_after is None else time.monotonic() + stop_after
    with stop_on_signal() as received:
        try:
            more = True
            while more or pool.active:
                if received:
                    raise Stopped(received[0])
                if time.monotonic() >= until:
                    pool.stop(GRACE)
                    return False
                more = turn()
                time.sleep(POLL)
                pool.collect()
        except BaseException:
            pool.stop()
            raise
    return True


def run_all(runs: list[Run], pool: Pool, stop_after: float | None = None) -> bool:
    """Run everything that is not done, in order; a run that fails is reported and does not stop the others.

    Args:
        runs: which.
        pool: how.
        stop_after: see `drive`.

    Returns:
        Whether everything has ended.

    Raises:
        Stopped: see `drive`.
    """
    waiting = [run for run in runs if read(run, pool.root).state not in ("done", "diverged")]

    def turn() -> bool:
        while waiting and pool.has_room:
            pool.start(waiting.pop(0))
        return bool(waiting)

    drive(pool, turn, stop_after)
    return all(read(run, pool.root).ended for run in runs)


def _tail(path: Path, start: int, size: int = 4096) -> list[str]:
    """The last lines of what a log holds from `start` on."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - size))
        return file.read().decode(errors="replace").splitlines()
