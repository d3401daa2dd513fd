"""StableQAT's slope (arXiv 2601.19320) as printed, with the position and its code added up; float64."""

import math

from tests.references.lsq import _round_half_even


def slope(q, amplitude, order):
    """`rho` at the position `q`, in bins."""
    z = 0.0
    for i in range(order):
        a_i = (-1) ** i * amplitude / (2 * i + 1)
        z += a_i * math.cos((2 * i + 1) * math.pi * (q + _round_half_even(q)))
    z *= math.sqrt(2) * math.pi
    return (1 - z) / (1 + z)
