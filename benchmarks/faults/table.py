"""Rows of the fault table, their registry, and the table as text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Row:
    """One fault.

    Attributes:
        fault: what is done.
        must: what has to happen.
        figure: what was measured.
        passed: whether it is what must be.
        failures: what went wrong, one line each.
        seconds: what the row took.
    """

    fault: str
    must: str
    figure: str
    passed: bool
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


Check = Callable[[], Row]

ROWS: dict[str, Check] = {}
"""Every row by its name, in the table's order; `@row` adds to it, for rows of several processes as well."""


def row(check: Check) -> Check:
    """Add a function to the table, under its name."""
    ROWS[check.__name__] = check
    return check


def counted(fault: str, must: str, unit: str, failures: list[str], tried: int) -> Row:
    """A row whose figure is `good / tried unit`."""
    figure = f"{tried - len(failures)} / {tried}{f' {unit}' if unit else ''}"
    return Row(fault, must, figure, not failures and tried > 0, failures)


def run_row(name: str) -> Row:
    """Run a row; one that crashes has failed."""
    started = time.monotonic()
    try:
        result = ROWS[name]()
    except Exception as error:  # the other rows still count
        result = Row(name, "the benchmark itself works", "crashed", False, [f"{type(error).__name__}: {error}"])
    result.seconds = round(time.monotonic() - started, 1)
    return result


def as_markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| fault | must | figure | |", "|---|---|---|---|"]
    lines += [f"| {r.fault} | {r.must} | {r.figure} | {'pass' if r.passed else '**fail**'} |" for r in rows]
    return "\n".join(lines)
