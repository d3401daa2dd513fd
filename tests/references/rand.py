"""RAND (arXiv 2305.15536) by loops over elements, float64: the scale of one group of weights and the gradients."""


def rand(w, zeta, g, top, norm):
    """Forward and gradient of `w + s(w) * zeta` for one group.

    Args:
        w: flat list of the weights that share a scale.
        zeta: noise in bins.
        g: incoming gradient.
        top: `2^(b-1) - 1`, or what stands for it.
        norm: whether s is the 8-norm of the two largest magnitudes, not the largest.

    Returns:
        w_hat, dL/dw, s
    """
    order = sorted(range(len(w)), key=lambda i: -abs(w[i]))[: 2 if norm else 1]
    power = 8 if norm else 1
    size = sum(abs(w[i]) ** power for i in order) ** (1 / power)
    scale = size / top
    ds = sum(a * b for a, b in zip(g, zeta, strict=True))
    dw = list(g)
    for i in order:
        slope = (abs(w[i]) / size) ** (power - 1) * (1 if w[i] > 0 else -1) / top
        dw[i] += ds * slope
    return [a + scale * b for a, b in zip(w, zeta, strict=True)], dw, scale
