"""From raw times to ratios: each round's own reference, then the median and the quartiles over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Attributes:
        median: of the values.
        lower: first quartile.
        upper: third quartile.
    """

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value; quartiles by linear interpolation between the values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each round's time over the reference's time in the same round: what slows a whole round down cancels."""
    return [time / base for time, base in zip(times, reference, strict=True)]


def order(keys: Sequence[str], number: int) -> list[str]:
    """Who is visited when in a round: another one begins each time, and every second round runs backwards.

    So nobody always comes after the same contestant, or always late in a round.
    """
    start = number % len(keys)
    rotated = [*keys[start:], *keys[:start]]
    return rotated[::-1] if number % 2 else rotated
