"""A layer's convolution and its gradients, by what computes them fastest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, pad

from qtemper.fast.integer import Geometry, convolve_codes

AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
"""Whether the CPU multiplies tiles of bfloat16."""


@dataclass(frozen=True)
class Convolution:
    """A layer's convolution, or its product of matrices as one of images of one pixel."""

    geometry: Geometry
    linear: bool
    channels_last: bool
    dtype: torch.dtype

    def numbers(self) -> list[int]:
        """All but the dtype, for an operator."""
        return [self.linear, self.channels_last, *self.geometry.numbers()]

    @classmethod
    def of(cls, numbers: list[int], dtype: torch.dtype) -> Convolution:
        """That of `numbers()`."""
        return cls(Geometry.of(numbers[2:]), bool(numbers[0]), bool(numbers[1]), dtype)


def pixels(x: Tensor, convolution: Convolution) -> Tensor:
    """A linear layer's operand, (..., features), as images of one pixel; a convolution's as it is."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1], 1, 1) if convolution.linear else x


def convolve_integers(x_codes: Tensor, w_codes: Tensor, scale: Tensor, shift: int, convolution: Convolution) -> Tensor:
    """The convolution of codes, in the memory format that torch's has: models may ask for a view of it."""
    out = convolve_codes(x_codes, w_codes, scale, shift, convolution.geometry, convolution.dtype)
    return out if convolution.channels_last else out.contiguous()


def convolve(x_hat: Tensor, w_hat: Tensor, convolution: Convolution) -> Tensor:
    """The float convolution, in its dtype."""
    stride, padding, dilation, groups = convolution.geometry
    x, w = x_hat.to(convolution.dtype), w_hat.to(convolution.dtype)
    if convolution.linear:
        return linear(x.flatten(1), w.flatten(1))[:, :, None, None]
    return conv2d(x, w, None, stride, padding, dilation, groups)


def convolve_backward(
    grad: Tensor, x_hat: Tensor, w_hat: Tensor, convolution: Convolution, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a convolution's operands, those that are wanted."""
    stride, padding, dilation, groups = (list(p) if isinstance(p, tuple) else p for p in convolution.geometry)
    x, w = x_hat.to(grad.dtype), w_hat.to(grad.dtype)
    mask = [wanted[0], wanted[1], False]
    found: Sequence[Tensor | None]
    if convolution.linear:
        g = grad.flatten(1)
        found = (
            (g @ w.flatten(1)).view(x.shape) if mask[0] else None,
            (g.T @ x.flatten(1)).view(w.shape) if mask[1] else None,
        )
    else:
        product = mask[1] and _weight_gradient_is_a_product(grad, x, w.shape[2:], convolution)
        if product:
            mask[1] = False
        found = (None, None)
        if mask[0] or mask[1]:
            found = torch.ops.aten.convolution_backward(
                grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
            )
        if product:
            found = found[0], _weight_gradient(grad, x, w.shape, convolution.geometry)
    grad_x, grad_w = found[:2]
    return (
        None if grad_x is None else grad_x.to(x_hat.dtype),
        None if grad_w is None else grad_w.to(w_hat.dtype),
    )


def _weight_gradient_is_a_product(grad: Tensor, x: Tensor, kernel: Sequence[int], convolution: Convolution) -> bool:
    # On a CPU with AMX, oneDNN's gradients of weights take 2 to 3 times a product's time where images are small and
    # channels many, as in the last layers of a ResNet. From 8x8 pixels on it is now one, now the other.
    if not AMX or grad.dtype != torch.bfloat16 or grad.device.type != "cpu" or not convolution.channels_last:
        return False
    plain = convolution.geometry.groups == 1 and convolution.geometry.dilation == (1, 1)
    # A window of more would be copied more than nine times.
    return (
        plain
        and kernel[0] * kernel[1] <= 9
        and grad.shape[2] * grad.shape[3] <= 49
        and grad.shape[1] * x.shape[1] >= 2**14
    )


def _weight_gradient(grad: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """As one product of matrices, with every window of the images written out as a row."""
    out, channels, height, width = shape
    (down, right), (above, left) = geometry.stride, geometry.padding
    rows = pad(x, (left, left, above, above)).permute(0, 2, 3, 1)
    windows = rows.unfold(1, height, down).unfold(2, width, right).permute(0, 1, 2, 4, 5, 3)
    product = grad.permute(0, 2, 3, 1).reshape(-1, out).T @ windows.reshape(-1, height * width * channels)
    if height == width == 1:
        return product.view(shape)  # with the strides that torch gives such weights
    return product.view(out, height, width, channels).permute(0, 3, 1, 2)
