"""Max pooling that a compiler leaves alone.

On a CPU, inductor's own kernels for max pooling of images in channels_last, forward and backward, take 3 times as long
as torch's (ResNet-18's, torch 2.13). Compiled, torch's are called; a model's own float layer is what runs elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtemper import fast


@torch.library.custom_op(
    "qtemper::max_pool",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding) -> (Tensor, Tensor)",
)
def _max_pool(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    out, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding)
    return out, indices.to(torch.int32)


@_max_pool.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    out, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding)
    return out, indices.to(torch.int32)


@torch.library.custom_op(
    "qtemper::max_pool_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor indices, int[] size, int[] kernel, int[] stride, int[] padding) -> Tensor",
)
def _max_pool_backward(
    grad: Tensor, indices: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    x = torch.empty(size, dtype=grad.dtype, memory_format=torch.channels_last)  # only its form is looked at
    result: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, x, kernel, stride, padding, [1, 1], False, indices.to(torch.int64)
    )
    return result


@_max_pool_backward.register_fake
def _(
    grad: Tensor, indices: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.numbers = inputs
    ctx.size = list(x.shape)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    (indices,) = ctx.saved_tensors
    return _max_pool_backward(grad, indices, ctx.size, *ctx.numbers), None, None, None


_max_pool.register_autograd(_backward, setup_context=_setup_context)


class MaxPool2d(nn.MaxPool2d):
    """The float layer; compiled on a CPU, with torch's own kernels."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C, H, W) to (N, C, H', W')."""
        plain = not (self.ceil_mode or self.return_indices) and self.dilation in (1, (1, 1))
        fits = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        result: Tensor
        if plain and fits and input.device.type == "cpu" and fast.fast_path() and torch.compiler.is_compiling():
            sizes = self.kernel_size, self.stride, self.padding
            result, _ = _max_pool(input, *([n, n] if isinstance(n, int) else list(n) for n in sizes))
        else:
            result = super().forward(input)
        return result
