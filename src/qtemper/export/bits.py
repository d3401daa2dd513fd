"""Integer codes in as few bits as hold them.

Odd codes (grids without a zero) are halved, and a channel that holds +2^(b-1), which b bits in two's complement lack,
is negated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stored:
    """Codes on their way into a file: `codes = sign * (2 * inner + 1 if doubled else inner)`.

    Attributes:
        inner: int8, fits `bits` in two's complement.
        bits: 1 to 8.
        doubled: whether all codes are odd.
        sign: int8, +-1 for each output channel, or None.
    """

    inner: NDArray[np.int8]
    bits: int
    doubled: bool
    sign: NDArray[np.int8] | None


def shrink(codes: NDArray[np.int8]) -> Stored:
    """The fewest bits that hold the codes of a weight, output channels first."""
    rows = codes.reshape(codes.shape[0], -1).astype(np.int16)
    doubled = bool((rows % 2 != 0).all())
    best: tuple[int, NDArray[np.int16], NDArray[np.bool_] | None] | None = None
    for flip in (None, rows.max(1) > -rows.min(1)):
        turned = rows if flip is None else np.where(flip[:, None], -rows, rows)
        inner = (turned - 1) // 2 if doubled else turned
        bits = next(b for b in range(1, 10) if -(2 ** (b - 1)) <= inner.min() and inner.max() < 2 ** (b - 1))
        if best is None or bits < best[0]:
            best = (bits, inner, flip)
    assert best is not None
    bits, inner, flip = best
    sign = None if flip is None else np.where(flip, -1, 1).astype(np.int8)
    return Stored(inner.astype(np.int8).reshape(codes.shape), min(bits, 8), doubled, sign)


def planes(inner: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Codes as planes of bits, shape (bits, bytes): plane k has bit k of each code + 2^(bits - 1)."""
    raised = (inner.astype(np.int16).reshape(-1) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits((raised[None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1, axis=1, bitorder="little")


def from_planes(packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The inverse of `planes`."""
    count = int(np.prod(shape))
    found = np.unpackbits(packed, axis=1, count=count, bitorder="little").astype(np.int16)
    total = (found << np.arange(bits, dtype=np.int16)[:, None]).sum(0) - 2 ** (bits - 1)
    codes: NDArray[np.int8] = total.astype(np.int8).reshape(shape)
    return codes
