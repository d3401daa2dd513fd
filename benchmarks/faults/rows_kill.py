"""Rows: a training that is killed or stopped ends with the very weights of one that was not."""

from __future__ import annotations

import functools
import random
import signal
import time
from pathlib import Path

from benchmarks.faults.driver import (
    EPOCHS,
    STEPS,
    Child,
    Trial,
    after_steps,
    command,
    continue_run,
    digest,
    epochs,
    parallel,
    scratch,
    signal_self,
    start,
)
from benchmarks.faults.table import Row, counted, row

CHAIN_LIMIT = 200


@functools.cache
def reference(*settings: str) -> tuple[str, str, float]:
    """An uninterrupted run: its weights' sha256, its epochs and its seconds."""
    with scratch() as folder:
        trial = start(command(folder / "run", *settings)).wait()
        assert trial.code == 0, trial.err
        found = digest(folder / "run")
        assert found is not None
        return found, str(epochs(folder / "run")), trial.seconds


def same_end(run: Path, trial: Trial, *settings: str) -> str | None:
    """What is different from the uninterrupted run, or None."""
    if trial.code != 0:
        return f"resuming ended with {trial.code}: {trial.err.strip()[-300:]}"
    expected = reference(*settings)
    if digest(run) != expected[0]:
        return "the final weights differ"
    return None if str(epochs(run)) == expected[1] else "the epochs in metrics.jsonl differ"


def killed_once(number: int) -> str | None:
    """One kill at a random moment of the run, then a resume."""
    with scratch() as folder:
        run = folder / "run"
        child = start(command(run))
        time.sleep(random.Random(number).uniform(0, reference()[2]))
        child.kill()
        trial = child.wait()
        if trial.code != 0:
            trial = continue_run(run)
        wrong = same_end(run, trial)
    return wrong and f"random kill {number}: {wrong}"


def killed_again_and_again(number: int) -> tuple[int, str | None]:
    """Killed, resumed, killed, until it is through: kills and what is wrong."""
    draw = random.Random(number)
    with scratch() as folder:
        run = folder / "run"
        for kills in range(CHAIN_LIMIT):
            child = start(command(run, resume=(run / "config.json").exists()))
            time.sleep(draw.uniform(0.3, 1.0) * reference()[2])
            child.kill()
            trial = child.wait()
            if trial.code != -signal.SIGKILL:
                return kills, same_end(run, trial)
    return CHAIN_LIMIT, "never through"


@row
def kill_at_random_moments() -> Row:
    """50 runs with one kill each, and four that are killed until they are through."""
    reference()
    failures = [wrong for wrong in parallel(killed_once, range(50)) if wrong]
    chains = parallel(killed_again_and_again, range(4))
    result = counted(
        "kill -9 at 50 random moments", "final weights' sha256 equal to the uninterrupted run", "", failures, 50
    )
    bad = [f"chain: {wrong}" for _, wrong in chains if wrong]
    result.figure += f"; chains of {', '.join(str(kills) for kills, _ in chains)} kills: {4 - len(bad)} / 4"
    result.failures += bad
    result.passed &= not bad
    return result


METHODS = ("tempering", "ewgs", "lsq")
STOPS = (STEPS + 1, STEPS + 5, 2 * STEPS, 2 * STEPS + 1, 4 * STEPS - 1, 4 * STEPS)


def stopped_at(cell: tuple[str, int, int]) -> str | None:
    """Stop a run right after a step by a signal that it sends itself, resume it."""
    method, step, number = cell
    settings = () if method == METHODS[0] else (f"method={method}",)
    with scratch() as folder:
        run = folder / "run"
        trial = start(command(run, *settings), lambda: after_steps(step, signal_self(number))).wait()
        if trial.code != 128 + number:
            return f"{cell}: exit code {trial.code}: {trial.err.strip()[-300:]}"
        if f"after step {step - STEPS};" not in trial.err:
            return f"{cell}: stopped elsewhere: {trial.err.strip()[-300:]}"
        wrong = same_end(run, continue_run(run, *settings), *settings)
    return wrong and f"{cell}: {wrong}"


@row
def stop_within_an_epoch() -> Row:
    """At an epoch's first step, a middle one and its last, with three methods."""
    cells = [(method, step, signal.SIGTERM.value) for method in METHODS for step in STOPS]
    for method in METHODS[1:]:
        reference(f"method={method}")
    reference()
    failures = [wrong for wrong in parallel(stopped_at, cells) if wrong]
    return counted(
        "mid-epoch stop and resume, 1 process",
        "epochs' metrics and weights bit-identical",
        "cells",
        failures,
        len(cells),
    )


LONG = ("train.epochs=12",)


def wait_until(child: Child, condition: Path) -> None:
    """Until a file is there or the child has ended."""
    while child.running() and not condition.exists():
        time.sleep(0.005)


def interrupted(case: tuple[int, int]) -> tuple[float, str | None]:
    """A signal from outside at a random moment after the first checkpoint: seconds until the exit, what is wrong."""
    number, seed = case
    with scratch() as folder:
        run = folder / "run"
        child = start(command(run, *LONG))
        wait_until(child, run / "checkpoints")
        time.sleep(random.Random(seed).uniform(0, 0.3))
        sent = time.monotonic()
        child.kill(number)
        trial = child.wait()
        seconds = time.monotonic() - sent
        if trial.code != 128 + number:
            return seconds, f"{case}: exit code {trial.code}: {trial.err.strip()[-300:]}"
        if "checkpoint written to" not in trial.err:
            return seconds, f"{case}: no checkpoint: {trial.err.strip()[-300:]}"
        wrong = same_end(run, continue_run(run, *LONG), *LONG)
    return seconds, wrong and f"{case}: {wrong}"


def interrupted_early(number: int) -> str | None:
    """A signal within the float training, of which nothing is kept: it starts again, to the same end."""
    with scratch() as folder:
        run = folder / "run"
        trial = start(command(run), lambda: after_steps(STEPS // 2, signal_self(number))).wait()
        if trial.code != 128 + number:
            return f"in the float training: exit code {trial.code}: {trial.err.strip()[-300:]}"
        wrong = same_end(run, continue_run(run))
    return wrong and f"in the float training: {wrong}"


@row
def signals() -> Row:
    """SIGTERM and SIGINT, five times each from outside, and once each within the float training."""
    cases = [(number.value, seed) for number in (signal.SIGTERM, signal.SIGINT) for seed in range(5)]
    reference(*LONG)
    reference()
    found = parallel(interrupted, cases)
    early = parallel(interrupted_early, [signal.SIGTERM.value, signal.SIGINT.value])
    failures = [wrong for wrong in [*(wrong for _, wrong in found), *early] if wrong]
    tried = len(cases) + len(early)
    result = counted("SIGTERM, SIGINT", "checkpoint, exit code 143/130, exact resume", "", failures, tried)
    result.figure += f"; at most {max(seconds for seconds, _ in found):.2f} s to the exit"
    return result


assert EPOCHS == 3  # STOPS names the first step, a middle one, an epoch's last, and the last of all
