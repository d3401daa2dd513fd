"""ReLU whose backward pass a compiler does not keep a mask for.

Of a ReLU that ends a residual block, torch.compile may keep where its output is zero, in bytes that are booleans. On a
CPU inductor's code writes those one by one: 11 to 18 ns each on one core, where a float takes 0.4 (torch 2.13,
AVX-512). Here the mask compares with a zero that is made of the gradient, so that it cannot be kept. A model's own
float layer is what runs not compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtemper import fast
from qtemper.leaf import leaf


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        zero = torch.sign(grad) * 0.0  # of the gradient, so that the mask cannot be made before the backward pass
        return torch.where(out <= zero, 0.0, grad)


@leaf("(Tensor x) -> Tensor")
def _relu(x: Tensor) -> Tensor:
    out: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
    return out


class ReLU(nn.ReLU):
    """The float layer; compiled on a CPU, with a mask that is made in the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, kept."""
        if not (torch.compiler.is_compiling() and fast.fast_path() and input.device.type == "cpu"):
            return super().forward(input)
        out = _relu(input)
        return input.copy_(out) if self.inplace else out
