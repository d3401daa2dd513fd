"""`python -m benchmarks.noise`: is the counter's noise noise? Statistics of 1e8 draws, as standard errors from chance.

Every line is a statistic that is normal with mean 0 and variance 1 for independent uniform numbers. The largest of
about a hundred is expected near 2.6; above 5 something is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

from qtemper.counter import NoiseSource

ROWS, COLUMNS = 4096, 1024
CHUNK = ROWS * COLUMNS
LAGS = (1, 2, 3, 7, 8, 16, 31, 32, 64, 127, 128, 256, 1000, 1024, 3136, 4096, 16384, 65536)
CELLS = 64
LIMIT = 5.0


def source(name: str, progress: float = 0.3, seed: int = 0) -> NoiseSource:
    """The noise of a quantizer at a moment of its training."""
    noise = NoiseSource()
    noise.seed(seed, name)
    noise.set_progress(progress)
    return noise


def draw(noise: NoiseSource, chunk: int, *, dither: bool = False) -> Tensor:
    """Rows `chunk * ROWS` and following, one after the other, centred, with variance 1 (float64)."""
    noise.block = (chunk * ROWS, 0)
    like = torch.empty(ROWS, COLUMNS)
    u = noise.dither(like) if dither else noise(like)
    return (u.double().flatten() - 0.5) * math.sqrt(12.0)


class Sums:
    """Sums over chunks of products whose mean is 0 and whose variance is known."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.weight: dict[str, float] = {}
        self.extremes: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor, variance: float = 1.0) -> None:
        """Add independent values of mean 0."""
        self.total[name] = self.total.get(name, 0.0) + float(values.sum())
        self.weight[name] = self.weight.get(name, 0.0) + variance * values.numel()

    def add_extreme(self, name: str, value: float, count: int) -> None:
        """Add the largest magnitude of so many normal numbers."""
        largest, before = self.extremes.get(name, (0.0, 0))
        self.extremes[name] = max(largest, value), before + count

    def scores(self) -> dict[str, float]:
        """Sums in their standard errors, and extremes as the normal number that is exceeded as rarely."""
        scores = {name: total / math.sqrt(self.weight[name]) for name, total in self.total.items()}
        for name, (value, count) in self.extremes.items():
            expected = torch.tensor(2 * count, dtype=torch.float64) * torch.special.ndtr(torch.tensor(-value).double())
            scores[name] = float(-torch.special.ndtri(-torch.expm1(-expected)))
        return scores


def add_structure(sums: Sums, kind: str, numbers: Tensor) -> None:
    """What noise that is mixed from a word a row and a word a column could give away."""
    for name, table in (("rows", numbers), ("columns", numbers.T)):
        for lag in (1, 5):
            products = table[:-lag] * table[lag:]
            dots = products.sum(1)
            length = products.shape[1]
            # Variance of a squared sum of products: 2 n**2 from the sum, (1.8**2 - 3) n from its terms.
            variance = 2 * length**2 + (1.8**2 - 3) * length
            sums.add(f"{kind}dependence of {name} {lag} apart", (dots**2 - length) / math.sqrt(variance))
    likeness = (numbers.float() @ numbers.float().T).triu(1).abs().max() / math.sqrt(COLUMNS)
    sums.add_extreme(f"{kind}likest two rows of a block", float(likeness), ROWS * (ROWS - 1) // 2)
    corners = numbers[:-1, :-1] * numbers[1:, :-1] * numbers[:-1, 1:] * numbers[1:, 1:]
    sums.add(f"{kind}corners of a square", corners)


def statistics(draws: int) -> dict[str, float]:
    """All statistics of so many draws."""
    sums = Sums()
    pairs = torch.zeros(CELLS * CELLS, dtype=torch.float64)
    chunks = max(1, draws // CHUNK)
    own, later = source("layer1.conv1.act"), source("layer1.conv1.act", 0.3 + 1 / 78000)
    other, reseeded = source("layer1.conv2.act"), source("layer1.conv1.act", seed=1)
    for chunk in range(chunks):
        u = draw(own, chunk)
        sums.add("mean", u)
        sums.add("variance", u * u - 1, 0.8)  # the fourth moment of this variable is 1.8
        sums.add("third moment", u**3, 27 / 7)
        for lag in LAGS:
            sums.add(f"elements {lag} apart", u[:-lag] * u[lag:])
        sums.add("this step and the next", u * draw(later, chunk))
        sums.add("two quantizers", u * draw(other, chunk))
        sums.add("two seeds", u * draw(reseeded, chunk))
        low = draw(own, chunk, dither=True)
        sums.add("dither: mean", low)
        sums.add("noise and its dither", u * low)
        own.block = (chunk * ROWS, 0)
        signed = own.signed(torch.empty(ROWS, COLUMNS)).double().flatten() * math.sqrt(3.0)
        sums.add("signed: mean", signed)
        sums.add("signed: variance", signed * signed - 1, 0.8)
        sums.add("signed and its dither", signed * low)
        for kind, numbers in (("", u.view(ROWS, COLUMNS)), ("dither: ", low.view(ROWS, COLUMNS))):
            add_structure(sums, kind, numbers)
        cell = ((u / math.sqrt(12.0) + 0.5) * CELLS).long().clamp_(0, CELLS - 1)
        pairs += torch.bincount(cell[:-1:2] * CELLS + cell[1::2], minlength=CELLS * CELLS).double()
    scores = sums.scores()
    expected = pairs.sum() / len(pairs)
    chi2, freedom = float(((pairs - expected) ** 2 / expected).sum()), len(pairs) - 1
    scores[f"pairs of neighbours, {CELLS} x {CELLS} cells"] = (chi2 - freedom) / math.sqrt(2 * freedom)
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10**8)
    draws = parser.parse_args().draws
    scores = statistics(draws)
    for name, score in scores.items():
        print(f"{name:40} {score:+6.2f}")
    worst = max(scores, key=lambda name: abs(scores[name]))
    print(f"{draws:.0e} draws; farthest from chance: {worst}, {scores[worst]:+.2f} standard errors")
    return 0 if abs(scores[worst]) < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
