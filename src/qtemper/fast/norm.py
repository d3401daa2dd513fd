"""Batch normalization that a compiler's loops read as it lies in memory.

Over images in channels_last, inductor's own loops for the sums of batch norm go through the whole tensor once for each
16 channels, at half the bandwidth (torch 2.13, AVX-512), and its formula for the output reads five vectors of channels,
for which the output is written to memory again in the backward pass. Here the sums are taken over the rows of an image
first (over a small image as a whole), and the output is `x * scale + shift`. A model's own float layer is what runs
elsewhere, and not compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtemper import fast
from qtemper.leaf import leaf
from qtemper.loops import in_memory, sum_pixels


class _Normalize(torch.autograd.Function):
    """Batch normalization; `mean` and `rstd` are those of `x`, and the gradient through them is part of that of `x`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        scale = weight * rstd
        out = x.float() * _vector(scale, len(weight)) + _vector(bias - mean * scale, len(weight))
        return out.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, mean, rstd = inputs
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        real, g, channels = x.float(), grad.float(), len(weight)
        count = real.numel() // channels
        total, product = sum_pixels(g), sum_pixels(g * (real - mean[:, None, None]))
        scale = weight * rstd
        slope = scale * rstd * rstd * product / -count
        shift = scale * total / -count - mean * slope
        grad_x = g * _vector(scale, channels) + (real * _vector(slope, channels) + _vector(shift, channels))
        return grad_x.to(x.dtype), product * rstd, total, None, None


@leaf("(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> Tensor")
def _normalize(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    out: Tensor = _Normalize.apply(x, weight, bias, mean, rstd)  # type: ignore[no-untyped-call]
    return out


def _vector(x: Tensor, channels: int) -> Tensor:
    """A vector of channels, for images."""
    return in_memory(x, (channels,))[:, None, None]


@leaf("(Tensor x) -> (Tensor, Tensor)")
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in one pass over the images once their middle rows are read.

    Deviations are from the mean of those rows: close enough that the difference of squares loses few digits.
    """
    real = x.float()
    count = real.numel() // real.shape[1]
    centre = real[:, :, real.shape[2] // 2].mean((0, 2))
    deviation = real - centre[:, None, None]
    offset = sum_pixels(deviation) / count
    variance = sum_pixels(deviation * deviation) / count - offset * offset
    return centre + offset, variance.clamp_min(0)


class BatchNorm2d(nn.BatchNorm2d):
    """The float layer; compiled on a CPU, with sums in the order of the memory."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape (N, C, H, W), kept."""
        if not (torch.compiler.is_compiling() and fast.fast_path() and self._fits(input)):
            return super().forward(input)
        count = input.numel() // input.shape[1]
        with torch.no_grad():
            mean, variance = _statistics(input)
            if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
                assert self.momentum is not None
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            rstd = torch.rsqrt(variance + self.eps)
        return _normalize(input, self.weight, self.bias, mean, rstd)

    def _fits(self, input: Tensor) -> bool:
        return (
            self.training
            and self.momentum is not None
            and all(t is not None and t.dtype == torch.float32 for t in (self.weight, self.bias))
            and all(t is None or t.dtype == torch.float32 for t in (self.running_mean, self.running_var))
            and input.dtype in (torch.float32, torch.bfloat16)
            and input.device.type == "cpu"
            and input.dim() == 4
            and input.shape[1] == self.num_features
            and input.is_contiguous(memory_format=torch.channels_last)
            and input.numel() > input.shape[1]
        )
