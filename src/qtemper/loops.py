"""Hints for a compiler's loops on a CPU: the same numbers, in an order and from a place that cost less."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from qtemper.leaf import compiling

Order = Literal["any", "pixels", "rows"]
"""Of a sum: `pixels` that of a batch norm's loop, `rows` one row of a kernel after the other."""

UNROLLED = 8
"""inductor writes out a sum of fewer numbers, and for each of them again what the number is made of."""


def in_memory(x: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """A scale, or a vector of channels, that a compiler for CPUs computes once.

    inductor would put its formula into every loop over the elements that it scales: more to compile, and for every
    element to compute. It has to have the input of `as_strided` in memory. What requires a gradient, or has another
    number of dimensions, is returned as it is.

    Args:
        x: a result of arithmetic, not a view of something larger.
        shape: of the vector; given, because to ask a gradient for its own makes Dynamo copy gradients.
    """
    if compiling() and x.device.type == "cpu" and x.dim() == len(shape):
        return x if x.requires_grad else torch.as_strided(x, shape, (1,) * len(shape))
    return x


def apart(x: Tensor) -> Tensor:
    """Numbers that count as a tensor of their own, though a loop that alone reads them keeps them in registers.

    To be put between half precision and integers. Where a loop's body has bfloat16 in it, inductor takes twice as many
    elements at a time, and converts integers one by one: a quantizer with noise takes 3 times as long (AVX-512, torch
    2.13). On either side of `as_strided` are two bodies.
    """
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or not (channels_last or x.is_contiguous()):
        return x
    rows = x.permute(0, 2, 3, 1) if channels_last else x
    stride = [math.prod(rows.shape[i + 1 :]) for i in range(rows.dim())]  # Dynamo fails to read one that changes
    rows = torch.as_strided(rows, rows.shape, stride)
    return rows.permute(0, 3, 1, 2) if channels_last else rows


def clamp_in_loops(x: Tensor, low: float, high: float) -> Tensor:
    """`torch.clamp`. For its maximum inductor looks for NaN, in three instructions, which in that of a ReLU are one."""
    if low == 0 and torch.compiler.is_compiling():
        return torch.clamp_max(torch.relu(x), high)
    return torch.clamp(x, low, high)


def sum_pixels(x: Tensor) -> Tensor:
    """Images (N, C, H, W) to (C,), a row of an image after the other; of rows that are short, an image.

    To a compiler a hint: over channels_last the order of the memory. Sums of the same images are then one loop.
    """
    x = x.permute(0, 2, 3, 1)
    return x.sum(2).sum((0, 1)) if x.shape[2] >= UNROLLED else x.sum((1, 2)).sum(0)


def order_of_sums(x: Tensor) -> Order:
    """How sums over what lies in memory as `x` does are to be taken.

    To be asked in the forward pass: Dynamo copies every gradient for a backward that looks at how memory is laid out.
    """
    if not compiling() or x.device.type != "cpu" or x.dim() != 4:
        return "any"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "any"
    return "pixels" if x.shape[2] * x.shape[3] > 9 else "rows"  # what has the size of a 3x3 kernel is one


def maximum(x: Tensor) -> Tensor:
    """The largest element, NaN if there is one."""
    return _rows(x).amax(-1).amax() if order_of_sums(x) == "rows" else x.amax()


def partial_sums(x: Tensor, order: Order) -> Tensor:
    """Some numbers whose sum is that of all elements."""
    if order == "pixels":
        return sum_pixels(x)
    return _rows(x).sum(-1) if order == "rows" else x.sum()[None]


def _rows(kernels: Tensor) -> Tensor:
    """Kernels (O, I, kH, kW) by their rows, in the order of the memory; by whole kernels where a row is short."""
    x = kernels.permute(0, 2, 3, 1)
    return x.flatten(2).flatten(0, 1) if x.shape[2] * x.shape[3] >= UNROLLED else x.flatten(1)
