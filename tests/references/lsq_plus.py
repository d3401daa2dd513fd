"""LSQ+ (Bhalgat et al., arXiv 2004.09576), activations, by loops over elements; float64."""

import math

from tests.references.lsq import _round_half_even


def lsq_plus(x, s, beta, bits, g, count):
    """`s * round(clip((x - beta) / s, 0, n)) + beta`.

    Returns:
        xhat, dL/dx, dL/ds, dL/dbeta
    """
    n = 2**bits - 1
    xhat, dx, ds, dbeta = [], [], 0.0, 0.0
    for value, grad in zip(x, g, strict=True):
        position = (value - beta) / s
        if position < 0 or position > n:
            code = 0 if position < 0 else n
            dx.append(0.0)
            ds += grad * code
            dbeta += grad
        else:
            code = _round_half_even(position)
            dx.append(grad)
            ds += grad * (code - position)
        xhat.append(s * code + beta)
    scale = 1 / math.sqrt(count * n)
    return xhat, dx, ds * scale, dbeta * scale
