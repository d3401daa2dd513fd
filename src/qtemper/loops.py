"""Hints for a compiler's loops on a CPU: the same numbers, in an order and from a place that cost less."""

from __future__ import annotations

import torch
from torch import Tensor


def in_memory(x: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """A scale, or a vector of channels, that a compiler for CPUs computes once.

    inductor would put its formula into every loop over the elements that it scales: more to compile, and for every
    element to compute. It has to have the input of `as_strided` in memory. What requires a gradient, or has another
    number of dimensions, is returned as it is.

    Args:
        x: a result of arithmetic, not a view of something larger.
        shape: of the vector; given, because to ask a gradient for its own makes Dynamo copy gradients.
    """
    if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and x.dim() == len(shape):
        return x if x.requires_grad else torch.as_strided(x, shape, (1,) * len(shape))
    return x


def sum_pixels(x: Tensor) -> Tensor:
    """Images (N, C, H, W) to (C,), a row of an image after the other.

    To a compiler a hint: over channels_last the order of the memory. Sums of the same images are then one loop.
    """
    return x.permute(0, 2, 3, 1).sum(2).sum((0, 1))


def in_pixel_order(x: Tensor) -> bool:
    """Whether sums over what lies in memory as `x` does are to be `sum_pixels`'s: in the loop of the next batch norm.

    To be asked in the forward pass: Dynamo copies every gradient for a backward that looks at how memory is laid out.
    """
    images = torch.compiler.is_compiling() and x.device.type == "cpu" and x.dim() == 4
    return images and x.is_contiguous(memory_format=torch.channels_last)


def total(x: Tensor, by_pixels: bool) -> Tensor:
    """The sum of all elements."""
    return sum_pixels(x).sum() if by_pixels else x.sum()
