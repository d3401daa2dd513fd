"""Schedules: pure functions from training progress in [0, 1] to a value. No counter inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps progress in [0, 1] to a value."""

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        ...


@dataclass(frozen=True)
class Constant:
    """`value`, always."""

    value: float = 1.0

    def __call__(self, progress: float) -> float:
        """`value`."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """Straight line from `start` to `end`."""

    start: float = 1.0
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        """`start + (end - start) * progress`."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` (Loshchilov and Hutter, ICLR 2017, without restarts)."""

    start: float = 1.0
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        """`end + (start - end) * (1 + cos(pi * progress)) / 2`."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step:
    """`start`, multiplied by `factor` at every milestone (fractions of the training)."""

    start: float = 1.0
    factor: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ValueError(
                f"milestones are fractions of the training, 0.5 for epoch 30 of 60, got {list(self.milestones)}."
            )

    def __call__(self, progress: float) -> float:
        """`start * factor ** (number of milestones reached)`."""
        reached: int = sum(progress >= milestone for milestone in self.milestones)
        return self.start * math.pow(self.factor, reached)


@dataclass(frozen=True)
class Exponential:
    """Exponential decay from `start` to `end`, both above zero; exactly 0 once below `cutoff`.

    With `start = T0`, `end = T0 * exp(-kappa)` this is the temperature `T0 * exp(-kappa * t / t_end)`.
    """

    start: float = 1.0
    end: float = 1e-2
    cutoff: float = 0.0

    def __post_init__(self) -> None:
        if self.start <= 0 or self.end <= 0:
            raise ValueError(
                f"Exponential needs start > 0 and end > 0, got start={self.start}, end={self.end}; "
                "for a value that is always zero use Constant(0)."
            )

    def __call__(self, progress: float) -> float:
        """`start * (end / start) ** progress`, or 0 below `cutoff`."""
        value = math.pow(self.start, 1 - progress) * math.pow(self.end, progress)
        return value if value >= self.cutoff else 0.0
