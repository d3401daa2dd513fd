"""PACT (Choi et al., arXiv 1805.06085) by loops over elements; float64."""

from tests.references.lsq import _round_half_even


def pact(x, alpha, bits, g):
    """`y = (|x| - |x - alpha| + alpha) / 2`, rounded to `2^bits - 1` bins.

    Returns:
        xhat, dL/dx, dL/dalpha
    """
    top = 2**bits - 1
    xhat, dx, dalpha = [], [], 0.0
    for value, grad in zip(x, g, strict=True):
        y = 0.5 * (abs(value) - abs(value - alpha) + alpha)
        xhat.append(_round_half_even(y * top / alpha) * alpha / top)
        dx.append(grad if 0 <= value < alpha else 0.0)
        dalpha += grad if value >= alpha else 0.0
    return xhat, dx, dalpha
