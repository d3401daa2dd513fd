"""Stop between two steps on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path


class TrainingInterrupted(Exception):  # noqa: N818 (an event, not an error)
    """Ctrl-C or SIGTERM: training stopped after a step, and a checkpoint was written where there is a place for it."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        where = f"checkpoint written to {checkpoint}" if checkpoint else "nothing was saved of this part"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {where}.")
        self.signum = signum


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that training stops between two steps; a second SIGINT stops at once."""
    received: list[int] = []

    def remember(signum: int, _frame: object) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    try:
        before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the application owns its signals
        yield received
        return
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
