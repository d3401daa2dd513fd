"""Rows: two processes, and the workers that decode images."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.driver import after_steps, digest, parallel, scratch, signal_self
from benchmarks.faults.events import Fault, FileEvents
from benchmarks.faults.groups import Group, curve, torchrun, worst
from benchmarks.faults.table import Row, counted, row
from benchmarks.faults.tiny import (
    CLASSES,
    EPOCHS,
    OPTIMIZERS,
    STEPS,
    folder,
    go_on,
    reference,
    same_end,
    tiny,
    weights,
)

# --- kill -9 -------------------------------------------------------------------------------------------------------

Point = tuple[int, int, Fault]
"""Processes, number of the first one's file event, what happens there."""


def points(size: int, chosen: Callable[[str], bool] = lambda _: True) -> list[Point]:
    """Before every chosen event, and in the middle of every write; after an event is before the next."""
    numbered = [(number, name) for number, name in enumerate(reference(size).events) if chosen(name)]
    found: list[Point] = [(size, number, "before") for number, _ in numbered]
    return found + [(size, number, "torn") for number, name in numbered if name.startswith("write ")]


def of_a_save(event: str) -> bool:
    """Whether a file event belongs to a checkpoint."""
    return "checkpoints" in event or "step-" in event


def killed_at(point: Point) -> str | None:
    """Kill the first process at one event, resume; returns what is wrong, or None."""
    size, number, fault = point

    def kill_the_first(rank: int) -> None:
        if rank == 0:
            FileEvents(run, number, fault).install()

    with scratch() as place:
        run = place / "run"
        first, *others = Group(tiny(run), kill_the_first, size=size).wait()
        if first.code != -signal.SIGKILL:
            return f"event {number}: not killed but {first.code}: {first.err.strip()[-300:]}"
        wrong = "the other rank ended well" if any(trial.code == 0 for trial in others) else None
        wrong = wrong or same_end(run, go_on(run, size), size)
    return wrong and f"killed {fault} event {number} ({reference(size).events[number]}): {wrong}"


@row
def kill_at_every_file_event() -> Row:
    """All events of a whole run of one process: its creation, the saves, the metrics, the final weights."""
    todo = points(1)
    failures = [wrong for wrong in parallel(killed_at, todo) if wrong]
    fault = "kill -9 at every file event of a run and its saves (before, torn, after), 1 process"
    return counted(fault, "resumes, final weights identical", "points", failures, len(todo))


@row
def kill_two_processes_at_every_event_of_a_save() -> Row:
    """All events of the three saves of a run of two processes, of which the first is killed."""
    todo = points(2, of_a_save)
    failures = [wrong for wrong in parallel(killed_at, todo) if wrong]
    fault = "kill -9 at every file event of a save (before, torn, after), 2 processes"
    return counted(fault, "resumes, final weights identical", "points", failures, len(todo))


# --- stop and resume -----------------------------------------------------------------------------------------------

WORKERS, SIZES = (0, 2, 4), (1, 2)
STOP = STEPS + 2
"""In the middle of the second epoch."""


def stopped_and_resumed(cell: tuple[int, int]) -> str | None:
    """Stop by a signal to the last process, resume; against the uninterrupted run without workers."""
    workers, size = cell
    setting = f"data.workers={workers}"

    def stop_the_last(rank: int) -> None:
        if rank == size - 1:
            after_steps(STOP * OPTIMIZERS, signal_self(signal.SIGTERM))

    with scratch() as place:
        run = place / "run"
        trials = Group(tiny(run, setting), stop_the_last, size=size).wait()
        if any(t.code != 128 + signal.SIGTERM or f"after step {STOP};" not in t.err for t in trials):
            return f"{cell}: {[t.code for t in trials]}: {worst(trials).err.strip()[-300:]}"
        trial = go_on(run, size, setting)
        if trial.code != 0:
            return f"{cell}: resuming ended with {trial.code}: {trial.err.strip()[-300:]}"
        expected = reference(size)
        if weights(run) != expected.weights:
            return f"{cell}: the final weights differ"
        return None if curve(run) == expected.curve else f"{cell}: the loss curve differs"


def uninterrupted(cell: tuple[int, int]) -> str | None:
    """Whether workers make a difference to a run that nothing happens to."""
    workers, size = cell
    found, expected = reference(size, f"data.workers={workers}"), reference(size)
    same = (found.weights, found.curve) == (expected.weights, expected.curve)
    return None if same else f"{cell}: workers make a difference"


@row
def stop_with_workers_and_processes() -> Row:
    """Every cell against the run without workers, and so against each other; stopped ones, and whole ones."""
    cells = [(workers, size) for size in SIZES for workers in WORKERS]
    whole = [wrong for cell in cells if cell[0] and (wrong := uninterrupted(cell))]
    failures = [wrong for cell in cells if (wrong := stopped_and_resumed(cell))]
    fault = "mid-epoch stop and resume, 0/2/4 workers, 1/2 processes"
    result = counted(fault, "loss curve and weights bit-identical, and to no workers", "cells", failures, len(cells))
    result.failures += whole
    result.passed &= not whole
    return result


# --- workers and images --------------------------------------------------------------------------------------------

SECONDS = 10.0
"""Within which an error has to be there."""

NAMED = "05.png"
"""The image that is damaged."""


def truncate_image(place: Path) -> None:
    """An image whose second half is gone, from the start."""
    path = place / "data" / "train" / CLASSES[1] / NAMED
    path.write_bytes(path.read_bytes()[:300])


def remove_image(place: Path) -> None:
    """A file vanishes."""
    (place / "data" / "train" / CLASSES[1] / NAMED).unlink()


def kill_worker(_: Path) -> None:
    """One of the processes that decode images dies."""
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


ImageFault = tuple[Callable[[Path], None], int, int, str]
"""What happens after the first step of the second epoch, workers, processes, what the error must name."""

IMAGE_FAULTS: list[ImageFault] = [
    (fault, workers, size, words)
    for fault, words, counts in (
        (truncate_image, NAMED, (0, 2)),
        (remove_image, NAMED, (0, 2)),
        (kill_worker, "image decoding process died", (2,)),
    )
    for workers in counts
    for size in SIZES
]


def broken_image(case: ImageFault) -> tuple[float, str | None]:
    """Seconds from the fault to the end of all processes, and what is wrong."""
    fault, workers, size, words = case
    with scratch() as place:
        shutil.copytree(folder(), place / "data")
        happened = place / "happened"

        def happen() -> None:
            fault(place)
            happened.write_text(str(time.monotonic()))

        def break_the_last(rank: int) -> None:
            if rank == size - 1:
                after_steps((2 * STEPS + 1) * OPTIMIZERS, happen)

        # 8 steps in an epoch: more than the batches that two workers have ready, so that a dead one is missed.
        settings = (f"data.workers={workers}", "train.epochs=12", "train.batch_size=6")
        group = Group(tiny(place / "run", *settings, data=place / "data"), break_the_last, size=size)
        trials = group.wait()
        seconds = time.monotonic() - float(happened.read_text())
    where = f"{fault.__name__}, {workers} workers, {size} processes"
    named = [trial for trial in trials if words in trial.err]
    if not named or not all(trial.code == 2 and sole_error(trial.err) for trial in named):
        return seconds, f"{where}: {[(trial.code, trial.err.strip()[-200:]) for trial in trials]}"
    return seconds, f"{where}: {seconds:.1f} s" if seconds > SECONDS else None


def sole_error(text: str) -> bool:
    """Whether a rank's output has exactly one line of an error, and no traceback."""
    return len(re.findall("^qtemper: ", text, re.MULTILINE)) == 1 and "Traceback" not in text


@row
def workers_and_images() -> Row:
    """A worker killed, an image damaged, an image gone: with and without workers, with one and two processes."""
    found = parallel(broken_image, IMAGE_FAULTS)
    failures = [wrong for _, wrong in found if wrong]
    fault = "worker killed, image undecodable, file vanishes; 1/2 processes"
    result = counted(fault, "error naming it in seconds, no hang", "", failures, len(found))
    result.figure += f"; at most {max(seconds for seconds, _ in found):.1f} s"
    return result


# --- a rank that dies or hangs -------------------------------------------------------------------------------------

DEATHS = ((0, 2), (1, STEPS + 2), (0, EPOCHS * STEPS))
"""Rank and step after which it is killed: before the first checkpoint, in an epoch, at the last step."""


def restarted(death: tuple[int, int]) -> str | None:
    """Kill -9 one rank under torchrun, which has to bring the run to its end by itself."""
    rank, step = death
    with scratch() as place:
        run = place / "run"
        trial, killed = torchrun(tiny(run), "kill", rank, step * OPTIMIZERS, restarts=1)
        if trial.code != 0:
            return f"{death}: torchrun ended with {trial.code}: {trial.err.strip()[-300:]}"
        if not killed:
            return f"{death}: not killed"
        expected = reference(2)
        if digest(run) != expected.digest:
            return f"{death}: the final weights differ"
        return None if curve(run) == expected.curve else f"{death}: the loss curve differs"


@row
def rank_killed_under_torchrun() -> Row:
    """Real torchrun, `--max-restarts 1`; at three moments."""
    failures = [wrong for death in DEATHS if (wrong := restarted(death))]
    must = "restarts, final weights equal to the uninterrupted run"
    return counted("one rank killed under torchrun --max-restarts", must, "", failures, len(DEATHS))


TIMEOUT = 5
SLACK = 3.0
"""Seconds that a rank may take beyond the timeout, to notice and to end."""


def hang_after_a_step(rank: int, which: int) -> None:
    """The rank stops between two steps."""
    if rank == which:
        after_steps((STEPS + 2) * OPTIMIZERS, stop_here)


def hang_in_a_save(rank: int, which: int) -> None:
    """The first rank stops while it writes; a network drive that hangs looks like this."""
    from qtemper.train import engine

    if rank == which:
        real = engine.save_checkpoint

        def hanging(*words: object) -> Path:
            stop_here()
            return real(*words)  # type: ignore[arg-type]

        engine.save_checkpoint = hanging  # type: ignore[attr-defined]


def hang_at_the_start(rank: int, which: int) -> None:
    """The rank never joins."""
    if rank == which:
        stop_here()


def stop_here() -> None:
    """Note the time, then SIGSTOP."""
    Path(os.environ["FAULTS_HUNG"]).write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSTOP)


HANGS: list[tuple[Callable[[int, int], None], int]] = [
    (hang_after_a_step, 0),
    (hang_after_a_step, 1),
    (hang_in_a_save, 0),
    (hang_at_the_start, 1),
    (hang_at_the_start, 0),
]


def hung(case: tuple[Callable[[int, int], None], int]) -> tuple[float, str | None]:
    """Seconds from the hang until the other rank has ended, and what is wrong."""
    fault, which = case
    with scratch() as place:
        stamp = place / "hung"
        arguments = tiny(place / "run", f"train.timeout={TIMEOUT}")
        hang = functools.partial(fault, which=which)
        group = Group(arguments, hang, settings={"FAULTS_HUNG": str(stamp)}, agent=True)
        trials = group.wait(grace=0)
        other = trials[1 - which]
        seconds = group.started + other.seconds - float(stamp.read_text())
    where = f"{fault.__name__}, rank {which}"
    if other.code != 2 or not sole_error(other.err) or "train.timeout" not in other.err:
        return seconds, f"{where}: {other.code}: {other.err.strip()[-400:]}"
    return seconds, f"{where}: {seconds:.1f} s" if seconds > TIMEOUT + SLACK else None


def hung_under_torchrun() -> str | None:
    """With a restart: the run goes on by itself when torchrun has given up the hung rank (30 s after SIGTERM)."""
    with scratch() as place:
        run = place / "run"
        setting = f"train.timeout={TIMEOUT}"
        trial, happened = torchrun(tiny(run, setting), "hang", 1, (STEPS + 2) * OPTIMIZERS, restarts=1)
        if trial.code != 0:
            return f"torchrun ended with {trial.code}: {trial.err.strip()[-400:]}"
        if not happened:
            return "under torchrun: it did not hang"
        return None if digest(run) == reference(2, setting).digest else "under torchrun: the final weights differ"


@row
def rank_hangs() -> Row:
    """One rank is stopped (SIGSTOP) after a step, in a save, at the start; once more under torchrun."""
    reference(2, f"train.timeout={TIMEOUT}")
    found = parallel(hung, HANGS, jobs=len(HANGS))  # they wait most of the time
    failures = [wrong for _, wrong in found if wrong]
    wrong = hung_under_torchrun()
    failures += [wrong] if wrong else []
    result = counted("one rank hangs", "aborts within the configured timeout", "", failures, len(HANGS) + 1)
    result.figure += f"; at most {max(seconds for seconds, _ in found):.1f} s with train.timeout={TIMEOUT}"
    return result
