"""DiffQ's weights (Defossez et al., arXiv 2104.09987) at a fixed bit width, by loops over elements; float64."""

from tests.references.lsq import _round_half_even


def diffq(w, bits, g, u=None):
    """`w + D * u` with `D = (max - min) / (2^bits - 1)`; without `u`, `min + D * round((w - min) / D)`.

    The hard quantizer's gradient is the straight-through estimator's: `u` is the rounding error, held constant.

    Returns:
        what, dL/dw
    """
    low, high = min(w), max(w)
    width = (high - low) / (2**bits - 1)
    if u is None:
        positions = [(value - low) / width for value in w]
        u = [_round_half_even(position) - position for position in positions]
    out = [value + width * noise for value, noise in zip(w, u, strict=True)]
    dw = list(g)
    moment = sum(grad * noise for grad, noise in zip(g, u, strict=True))
    dw[w.index(high)] += moment / (2**bits - 1)
    dw[w.index(low)] -= moment / (2**bits - 1)
    return out, dw
