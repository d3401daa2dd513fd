"""DoReFa (Zhou et al., arXiv 1606.06160) by loops over elements in the paper's own [0, 1] domain; float64."""

import math

from tests.references.lsq import _round_half_even


def weights(w, bits, g, *, real=False, exact=True):
    """`2 * quant(tanh(w) / (2 M) + 1/2) - 1`, times M if `real`; in one bit `sign(w) * E|w|`.

    Returns:
        what, dL/dw
    """
    if bits == 1:
        mean = sum(map(abs, w)) / len(w)
        return [mean if value >= 0 else -mean for value in w], list(g)
    top = 2**bits - 1
    t = [math.tanh(value) for value in w]
    largest = max(map(abs, t))
    which = [abs(value) for value in t].index(largest)
    out, dw, dm = [], [], 0.0
    for value, grad in zip(t, g, strict=True):
        level = 2 * _round_half_even(top * (value / (2 * largest) + 0.5)) / top - 1
        factor = largest if real else 1.0
        out.append(level * factor)
        # straight through quant: d level / d(value / largest) = 1
        dw.append(grad * factor / largest * (1 - value**2))
        dm += grad * factor * -value / largest**2 + (grad * level if real else 0.0)
    if exact:
        dw[which] += dm * math.copysign(1.0, t[which]) * (1 - t[which] ** 2)
    return out, dw


def activations(x, bits, g):
    """`quant(clip(x, 0, 1))`.

    Returns:
        xhat, dL/dx
    """
    top = 2**bits - 1
    xhat = [_round_half_even(top * min(max(value, 0.0), 1.0)) / top for value in x]
    return xhat, [grad if 0 <= value <= 1 else 0.0 for value, grad in zip(x, g, strict=True)]
