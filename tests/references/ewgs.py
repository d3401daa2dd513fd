"""EWGS (Lee et al., CVPR 2021) in the paper's own form: bounds l, u and a domain normalised to [0, 1]; float64."""

from tests.references.lsq import _round_half_even


def ewgs(x, lower, upper, bits, delta, g):
    """Forward and gradients of `x_q * (u - l) + l` with `x_n = clip((x - l) / (u - l), 0, 1)`.

    Backward: `g_n = g_q * (1 + delta * sign(g_q) * (x_n - x_q))`, then plain calculus through x_n and the affine map.

    Returns:
        xhat, dL/dx, dL/dl, dL/du
    """
    top = 2**bits - 1
    width = upper - lower
    xhat, dx, dl, du = [], [], 0.0, 0.0
    for value, grad in zip(x, g, strict=True):
        t = (value - lower) / width
        x_n = min(max(t, 0.0), 1.0)
        x_q = _round_half_even(top * x_n) / top
        xhat.append(x_q * width + lower)
        g_q = grad * width
        sign = (g_q > 0) - (g_q < 0)
        g_n = g_q * (1 + delta * sign * (x_n - x_q))
        if not 0 <= t <= 1:
            g_n = 0.0
        dx.append(g_n / width)
        # the affine map back, and t's own dependence on the bounds: dt/dl = (t - 1) / width, dt/du = -t / width
        dl += grad * (1 - x_q) + g_n * (t - 1) / width
        du += grad * x_q + g_n * (-t) / width
    return xhat, dx, dl, du
