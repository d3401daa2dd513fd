"""How the values of a quantizer become 8-bit integers: codes as they are, noise on a finer grid.

Noise that is not on the grid is rounded to the finer grid at random, without bias. A code stays where it is, so that
where the noise has faded the integers are the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtemper.counter import NoiseSource
from qtemper.loops import apart
from qtemper.quantizer import Quantizer

MIN_STEPS = 8
"""Steps per bin below which noise is not put on a finer grid, but convolved as float numbers."""

MAX_STEPS = 64
"""More are of no use."""

INEXACT = (13, 14, 15, 26, 28, 30, 41, 47, 52, 55, 56, 60, 61, 63)
"""Steps per bin whose float32 reciprocal, times a multiple of half of them, is not always exact."""


@dataclass(frozen=True)
class Packing:
    """How positions become 8-bit integers: `(position - zero_point) * steps + shift`.

    Attributes:
        zero_point: of the positions.
        steps: integers per bin; 1 for codes, 2 for codes with a zero point of one half, more for noise.
        shift: the integer that stands for zero.
        low: smallest integer.
        high: largest integer.
        integral: whether positions are codes, so that nothing is rounded here.
        noisy: whether noise is in the positions, so that it costs less to keep them than to find them again.
    """

    zero_point: float
    steps: int
    shift: int
    low: int
    high: int
    integral: bool
    noisy: bool

    def pack(self, positions: Tensor, noise: NoiseSource | None) -> Tensor:
        """Positions as uint8 or int8; those between two steps of a finer grid rounded to either at random."""
        relative = positions - self.zero_point if self.zero_point else positions
        if not self.integral:
            assert noise is not None
            steps = relative * self.steps + noise.dither(positions, self.shift)
            if self.low < 0:  # conversion rounds towards zero
                steps = torch.floor(steps)
        else:  # a product that is an integer
            steps = relative * self.steps + self.shift if self.steps != 1 or self.shift else relative
        if self.low < 0:
            return steps.to(torch.int8)
        if torch.compiler.is_compiling():
            return steps.to(torch.uint8)
        # torch's own conversion of floats to uint8 takes three times as long as either of these; inductor's does not.
        return steps.to(torch.int8).view(torch.uint8) if self.high < 128 else steps.to(torch.int16).to(torch.uint8)

    def unpack(self, codes: Tensor, like: Tensor) -> Tensor:
        """Positions of codes, in the dtype of `like`."""
        steps = codes.to(like.dtype)
        value = (steps - self.shift if self.shift else steps) * (1.0 / self.steps)
        return value + self.zero_point if self.zero_point else value


def packing_of(quantizer: Quantizer, *, signed: bool) -> Packing | None:
    """The finest packing into int8 or uint8 that is allowed, or None if there is none."""
    if quantizer.grid.has_offset:
        return None
    # Half bins, so that only integers and strings decide: torch.compile would make variables of floats.
    qmin, qmax, _ = quantizer.grid.limits
    half = 1 if quantizer.grid.levels == "symmetric" else 0
    noisy = quantizer.training and not quantizer.rounding.hard_forward and len(noise_of(quantizer)) > 0
    below, above = 2 * qmin + half, 2 * qmax + half
    if quantizer.integral:
        steps = 1 + half
    else:
        reach = quantizer.rounding.reach
        if reach is None or not noisy:
            return None
        below, above = below - 2 * reach, above + 2 * reach
        steps = 2 * 127 // max(-below, above) if signed else 2 * 255 // (above - below)
        steps = min(steps, MAX_STEPS)
        while steps in INEXACT or steps % (1 + half):
            steps -= 1
        if steps < MIN_STEPS:
            return None
    low, high = below * steps // 2, -(-above * steps // 2)
    shift = 0 if signed else -low
    if low + shift < (-128 if signed else 0) or high + shift > (127 if signed else 255):
        return None
    return Packing(-0.5 if half else 0.0, steps, shift, low + shift, high + shift, quantizer.integral, noisy)


def quantize(quantizer: Quantizer, packing: Packing | None, x: Tensor, *, half: bool = False) -> tuple[Tensor, Tensor]:
    """Fake-quantized values, and the integers that they are made of (empty where there are none).

    `half`: whether `x` or the values' gradient is of half precision; the numbers are the same.
    """
    if packing is None or not packing.noisy:
        x_hat, positions = quantizer.quantize(x)
        return x_hat, positions.new_empty(0) if packing is None else packing.pack(positions, None)
    codes: list[Tensor] = []

    def through_codes(positions: Tensor) -> Tensor:
        if half and x.dtype != torch.float32:
            positions = quantizer.positions(apart(x.detach().float()))
        codes.append(packing.pack(positions, noise_of(quantizer)[0]))
        value = packing.unpack(codes[0], positions)
        return apart(value) if half and x.dtype == torch.float32 else value

    return quantizer.quantize(x, through_codes)[0], codes[0]


def fake_quantize(quantizer: Quantizer, packing: Packing | None, x: Tensor) -> Tensor:
    """The first of `quantize`, without the other's cost: codes are made only where they change the values."""
    return quantize(quantizer, packing if packing is not None and packing.noisy else None, x)[0]


def codes_of(quantizer: Quantizer, packing: Packing, x: Tensor) -> Tensor:
    """The second of `quantize`, without the other's cost; no gradient."""
    with torch.no_grad():
        return packing.pack(quantizer.positions(x), noise_of(quantizer)[0] if packing.noisy else None)


def noise_of(*quantizers: Quantizer) -> list[NoiseSource]:
    """The noise sources of quantizers."""
    return [module for q in quantizers for module in q.modules() if isinstance(module, NoiseSource)]
