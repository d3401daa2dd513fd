"""LSQ (Esser et al., ICLR 2020) by loops over elements, float64. Symbols as in the paper."""

import math


def lsq(v, s, q_n, q_p, g, count, offset=0.0):
    """Forward and gradients of `vhat = s * (round(clip(v / s + offset, -q_n, q_p)) - offset)`.

    Args:
        v: flat list of values.
        s: step.
        q_n: magnitude of the lowest code.
        q_p: highest code.
        g: incoming gradient, flat list.
        count: N of the gradient scale 1 / sqrt(N * Q_P).
        offset: zero point (0 in the paper, -1/2 on the mid-rise grid).

    Returns:
        vhat, dL/dv, dL/ds
    """
    vhat, dv, ds = [], [], 0.0
    for value, grad in zip(v, g, strict=True):
        position = value / s + offset
        if position <= -q_n:
            code, inside, slope = -q_n, position == -q_n, -q_n - offset
        elif position >= q_p:
            code, inside, slope = q_p, position == q_p, q_p - offset
        else:
            code = _round_half_even(position)
            inside, slope = True, code - position
        vhat.append(s * (code - offset))
        dv.append(grad if inside else 0.0)
        ds += grad * slope
    normalizer = q_p if q_p > 0 else q_n
    return vhat, dv, ds / math.sqrt(count * normalizer)


def _round_half_even(x):
    low = math.floor(x)
    if x - low < 0.5 or (x - low == 0.5 and low % 2 == 0):
        return low
    return low + 1
