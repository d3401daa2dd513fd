"""NIPQ's noise (Shin et al., CVPR 2023) by loops, float64: an error of a histogram by inversion of its CDF."""


def draw(positions, uniforms):
    """Errors drawn from the histogram of those of `positions` that are on no code; 0 for those that are.

    Args:
        positions: flat list, in bins, of what shares a histogram.
        uniforms: one number in (0, 1) for each.
    """
    counts = [0] * 256
    for v in positions:
        if v != round(v):
            counts[min(int((round(v) - v + 0.5) * 256), 255)] += 1
    out = []
    for v, u in zip(positions, uniforms, strict=True):
        if v == round(v):
            out.append(0.0)
            continue
        left, found = u * sum(counts), 0
        while left >= counts[found]:
            left -= counts[found]
            found += 1
        out.append((found + 0.5) / 256 - 0.5)
    return out
