"""What a sweep searches: one axis for each `--search`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

from qtemper.errors import ConfigError

EXAMPLES = "--search path=0.01..0.2:log, path=1..8 or path=a,b,c"


@dataclass(frozen=True)
class Axis(ABC):
    """One setting that a sweep varies.

    Attributes:
        path: of the setting, as `--set` takes it.
    """

    path: str

    @abstractmethod
    def suggest(self, trial: Any) -> str:
        """An Optuna trial's value, as text; the same one every time the same trial is asked."""

    @abstractmethod
    def at(self, u: float) -> Any:
        """The value, for Optuna, at a place from 0 to 1 of the axis."""

    @abstractmethod
    def corners(self) -> list[str]:
        """Values of which each must fit the recipe."""


@final
@dataclass(frozen=True)
class Range(Axis):
    """Numbers between two ends; whole ones if both ends are.

    Attributes:
        low: the least.
        high: the largest.
        log: whether ratios count, not differences.
    """

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the axis holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Any) -> str:
        """See `Axis`; to four digits."""
        if self.whole:
            return str(trial.suggest_int(self.path, self.low, self.high, log=self.log))
        return f"{trial.suggest_float(self.path, self.low, self.high, log=self.log):.4g}"

    def at(self, u: float) -> float:
        """See `Axis`."""
        value = self.low * (self.high / self.low) ** u if self.log else self.low + u * (self.high - self.low)
        return round(value) if self.whole else value

    def corners(self) -> list[str]:
        """See `Axis`."""
        return [f"{self.low}", f"{self.high}"]


@final
@dataclass(frozen=True)
class Choice(Axis):
    """Some values.

    Attributes:
        values: as `--set` takes them.
    """

    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """See `Axis`."""
        return str(trial.suggest_categorical(self.path, self.values))

    def at(self, u: float) -> str:
        """See `Axis`."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def corners(self) -> list[str]:
        """See `Axis`."""
        return list(self.values)


def spread(axes: list[Axis], count: int, first: int = 0) -> list[dict[str, Any]]:
    """Values for so many trials that cover the axes evenly: from the middle on, or from a later one of the sequence.

    The additive recurrence with the generalised golden ratio (M. Roberts, 2018): in one dimension, multiples of the
    golden ratio modulo 1.
    """
    ratio = 2.0
    for _ in range(30):  # the positive root of x^(d+1) = x + 1, by iteration
        ratio = (1 + ratio) ** (1 / (len(axes) + 1))
    return [
        {axis.path: axis.at((0.5 + (first + n) * ratio ** -(i + 1)) % 1) for i, axis in enumerate(axes)}
        for n in range(count)
    ]


def parse(texts: list[str]) -> list[Axis]:
    """The axes of a sweep.

    Args:
        texts: `path=low..high`, `path=low..high:log`, or `path=value,value,...`.

    Raises:
        ConfigError: none, one that cannot be read, or two of one path.
    """
    if not texts:
        raise ConfigError(f"nothing to search: give {EXAMPLES}.")
    axes = [_parse(text) for text in texts]
    for axis in axes:
        if sum(other.path == axis.path for other in axes) > 1:
            raise ConfigError(f"{axis.path} is searched twice; give it one --search.")
    return axes


def _parse(text: str) -> Axis:
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not path or not values:
        raise ConfigError(f"cannot read {text!r}; write {EXAMPLES}.")
    if ".." not in values:
        choices = tuple(value.strip() for value in values.split(","))
        if "" in choices or len(set(choices)) != len(choices):
            raise ConfigError(f"{text!r} has an empty value or one twice; write {EXAMPLES}.")
        return Choice(path, choices)
    ends, _, scale = values.partition(":")
    if scale not in ("", "log"):
        raise ConfigError(f"cannot read {scale!r} in {text!r}; write {EXAMPLES}.")
    try:
        low, high = (_number(end) for end in ends.split(".."))
    except ValueError:
        raise ConfigError(f"{text!r} needs two numbers, low..high; write {EXAMPLES}.") from None
    if not low < high or (scale == "log" and low <= 0):
        raise ConfigError(f"{text!r} must rise" + (", from above zero." if scale == "log" else "."))
    return Range(path, low, high, scale == "log")


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
