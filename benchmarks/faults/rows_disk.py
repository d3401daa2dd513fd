"""Rows: disks that are full or read-only, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.faults import tiny
from benchmarks.faults.driver import (
    EPOCHS,
    STEPS,
    Trial,
    after_steps,
    command,
    continue_run,
    limit_file_size,
    parallel,
    scratch,
    start,
)
from benchmarks.faults.events import FileEvents
from benchmarks.faults.rows_kill import reference, same_end
from benchmarks.faults.table import Row, row

from qtemper.weights import read_safetensors

ROOM = 1_400 * 1024
"""Bytes of a disk that is full at the second checkpoint: the float network, one checkpoint and a half."""

SMALL = 100_000
"""A file size limit above the metrics' and below a checkpoint's."""


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """A mount at `folder`, or False where this user may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def unclear(trial: Trial, run: Path, what: str) -> str | None:
    """What is wrong with how a run met its disk, or None."""
    if not trial.clear:
        return f"{what}: exit code {trial.code}: {trial.err.strip()[-300:]}"
    return None if what in trial.err else f"{what} is not what it said: {trial.err.strip()[-300:]}"


def full(folder: Path) -> tuple[str | None, str]:
    """A disk that has room for one checkpoint; then room is made."""
    disk = folder / "disk"
    run = disk / "run"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs") as possible:
        if not possible:
            trial = start(command(folder / "run"), at_second_save(folder / "run", errno.ENOSPC)).wait()
            said = unclear(trial, folder / "run", "No space left")
            return said or same_end(folder / "run", continue_run(folder / "run")), "simulated"
        said = unclear(start(command(run)).wait(), run, "No space left")
        said = said or (None if list(run.glob("checkpoints/step-*")) else "no checkpoint is left")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        return said or same_end(run, continue_run(run)), "tmpfs"


def limited(folder: Path) -> tuple[str | None, str]:
    """A file size limit that falls on the running process after its first epoch."""
    run = folder / "run"
    trial = start(command(run), lambda: after_steps(2 * STEPS + 1, lambda: limit_file_size(SMALL))).wait()
    return unclear(trial, run, "File too large") or same_end(run, continue_run(run)), "RLIMIT_FSIZE"


def read_only(folder: Path) -> tuple[str | None, str]:
    """The whole run directory read-only after the first epoch; root, too, is stopped by a mount."""
    disk = folder / "disk"
    run = disk / "run"
    with mounted(disk, "-t", "tmpfs", "-o", "size=64m", "tmpfs") as possible:
        if not possible:
            trial = start(command(folder / "run"), at_second_save(folder / "run", errno.EROFS)).wait()
            said = unclear(trial, folder / "run", "Read-only")
            return said or same_end(folder / "run", continue_run(folder / "run")), "simulated"

        def freeze() -> None:
            done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
            if done.returncode != 0:  # a file is open for writing: let the calls fail as they would
                FileEvents(run, 0, "error", error_number=errno.EROFS).install()

        said = unclear(start(command(run), lambda: after_steps(2 * STEPS + 1, freeze)).wait(), run, "Read-only")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return said or same_end(run, continue_run(run)), "remounted ro"


def at_second_save(run: Path, number: int) -> Callable[[], None]:
    """Let every write fail from the second epoch of quantized training on, the third with the float one."""
    events = FileEvents(run, 0, "error", error_number=number)
    return lambda: after_steps(2 * STEPS + 1, events.install)


def failing_at(number: int) -> str | None:
    """The disk is full from one event on: a clear error, and with room again the run ends as it should."""
    with scratch() as folder:
        run = folder / "run"
        trial = start(tiny.tiny(run), FileEvents(run, number, "error").install).wait()
        said = unclear(trial, run, "No space left") or tiny.same_end(run, tiny.go_on(run, 1), 1)
    return said and f"event {number} ({tiny.reference(1).events[number]}): {said}"


@row
def disk_full_or_read_only() -> Row:
    """Three real disks, and ENOSPC from every second file event of a run on."""
    reference()
    failures, how = [], []
    for case in (full, limited, read_only):
        with scratch() as folder:
            said, kind = case(folder)
        how.append(kind)
        failures += [f"{case.__name__}: {said}"] if said else []
    good = 3 - len(failures)
    todo = [i for i, name in enumerate(tiny.reference(1).events) if name.split()[0] not in ("unlink", "rmdir")][::2]
    everywhere = [said for said in parallel(failing_at, todo) if said]
    return Row(
        "disk full (ENOSPC), file size limit, read-only directory",
        "clear error, previous checkpoint intact",
        f"{good} / 3 ({', '.join(how)}); ENOSPC at any event {len(todo) - len(everywhere)} / {len(todo)}",
        not failures and not everywhere,
        failures + everywhere,
    )


# --- not finite --------------------------------------------------------------------------------------------------


def poison_loss(step: int, factor: float) -> Callable[[], None]:
    """Multiply the loss after the n-th optimizer step."""
    return lambda: after_steps(step, lambda: _wrap_loss(lambda value: value * factor))


def poison_gradient(step: int, factor: float) -> Callable[[], None]:
    """Multiply the gradient after the n-th optimizer step, and leave the loss as it is."""

    def wrapped(value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient * factor)
        return value

    return lambda: after_steps(step, lambda: _wrap_loss(wrapped))


def _wrap_loss(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    real = torch.nn.functional.cross_entropy
    once = [True]

    def cross_entropy(*args: object, **options: object) -> torch.Tensor:
        value = real(*args, **options)  # type: ignore[arg-type]
        return change(value) if once and once.pop() else value

    torch.nn.functional.cross_entropy = cross_entropy


POISONS = {
    "NaN loss": lambda step: poison_loss(step, math.nan),
    "infinite loss": lambda step: poison_loss(step, math.inf),
    "NaN gradient": lambda step: poison_gradient(step, math.nan),
    "infinite gradient": lambda step: poison_gradient(step, math.inf),
}


def poisoned(case: tuple[str, int]) -> tuple[float, str | None]:
    """One step that is not finite: steps until it is noticed, and what is wrong."""
    name, step = case
    with scratch() as folder:
        run = folder / "run"
        trial = start(command(run), POISONS[name](STEPS + step)).wait()
        held = [
            path
            for path in run.glob("checkpoints/step-*/*.safetensors")
            for key, tensor in read_safetensors(path).items()
            if tensor.is_floating_point() and "code_range" not in key and not bool(torch.isfinite(tensor).all())
        ]
        if held:
            return math.inf, f"{name} in step {step + 1}: {held[0].name} holds it"
        if not trial.clear:
            return math.inf, f"{name} in step {step + 1}: exit code {trial.code}: {trial.err.strip()[-300:]}"
        said = re.search(r"step (\d+)", trial.err)
        late = int(said[1]) - (step + 1) if said else math.inf
        wrong = same_end(run, continue_run(run))  # the fault was the machine's: without it the run goes on
    return late, wrong and f"{name} in step {step + 1}: {wrong}"


@row
def not_finite() -> Row:
    """In the first step, within an epoch, in its last step, and in the very last."""
    reference()
    cases = [(name, step) for name in POISONS for step in (0, 5, STEPS - 1, STEPS + 4, EPOCHS * STEPS - 1)]
    found = parallel(poisoned, cases)
    failures = [wrong for _, wrong in found if wrong]
    latest = max(late for late, _ in found)
    failures += [
        f"{case}: noticed {late:.0f} steps late" for case, (late, w) in zip(cases, found, strict=True) if late and not w
    ]
    return Row(
        "NaN or infinite loss or gradient",
        "noticed in the same step; no checkpoint ever holds it",
        f"{latest:.0f} steps to notice, at most; {len(cases) - len(failures)} / {len(cases)}",
        not failures,
        failures,
    )
