"""Convolution of integer codes by its definition, in 64-bit integers."""

import numpy as np


def convolve_int64(x, zero_point, w, bias, stride, padding, groups):
    """Sum of (x - zero_point) * w over each window, plus bias; (N, C, H, W) and (O, C / groups, k, k)."""
    x = np.pad(x.astype(np.int64) - zero_point, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    w = w.astype(np.int64)
    size = w.shape[2]
    rows = (x.shape[2] - size) // stride + 1
    columns = (x.shape[3] - size) // stride + 1
    out = np.zeros((x.shape[0], w.shape[0], rows, columns), dtype=np.int64)
    inputs, outputs = w.shape[1], w.shape[0] // groups
    for o in range(w.shape[0]):
        first = o // outputs * inputs
        for i in range(rows):
            for j in range(columns):
                window = x[:, first : first + inputs, i * stride : i * stride + size, j * stride : j * stride + size]
                out[:, o, i, j] = (window * w[o]).sum((1, 2, 3)) + bias[o]
    return out
