"""RAND: noise on weights whose scale is a function of the weights, with its gradient.

Qiu, Rim, Ding, Rybakov and He, "RAND: Robustness Aware Norm Decay for Quantized Seq2seq Models", arXiv 2305.15536.

    training   w_hat = w + s(w) * zeta,    zeta ~ U(-1/2, 1/2);  w_hat = w before progress `start`
    eval       w_hat = s(w) * (round(v) - z),    v = w / s(w) + z
    scale      mode `max`:   s = max |w| / t
               mode `norm`:  s = (sum over the k = 2 largest |w| of |w|^8)^(1/8) / t
    backward   dL/dw = g + ds/dw * sum g * zeta, over the elements that share s

t = qmax - z, which is the paper's 2^(b-1) - 1 on the signed grid. So nothing is clipped in either mode, and the code
-2^(b-1) is not used. Large weights alone set s, so what the noise costs draws in just those: norm decay.

Learned: nothing for weights; for activations, which the paper leaves in float, LSQ's step.

Our reading:
- The constant of mode `norm` was not found: it is 1 / t, so that both modes differ by a factor of 1 to 2^(1/8) = 1.09.
- Where t is 0 (one bit, signed) it is |qmin|, and positive weights are clipped, with straight-through's gradient all
  the same. One bit's default is the symmetric grid, t = 1/2.
- `block` is the number of weights that share a scale ("sub-channel"), in the order of the weight's dimensions. With one
  scale a channel it must divide a channel's size, or the channel has one scale; with one scale a tensor, which is the
  policy's default, it must divide the tensor's, or that has one, and blocks may run from one channel into the next.
- The default is mode `max` at the policy's granularity; the paper has `max` per channel or block, `norm` per tensor.
- In eval mode the scale's gradient is kept too, with round(v) - v for zeta.
- `scale_gradient=False` is the paper's point taken away, for comparison: dL/dw = g, and outliers are pulled by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.counter import NoiseSource
from qtemper.methods.lsq import LearnedStep
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind

ModeName = Literal["max", "norm"]


def magnitude(rows: Tensor, mode: ModeName) -> Tensor:
    """Largest magnitude of each row, or the 8-norm of its two largest; shape (rows, 1), with its gradient."""
    if mode == "max":
        return rows.abs().amax(1, keepdim=True)
    top = rows.abs().topk(min(2, rows.shape[1]), dim=1).values
    # In units of the largest, or small weights to the eighth were zero. A row of zeros stays at 0, without gradient.
    unit = F.positive(top[:, :1].detach())
    return unit * ((top / unit).pow(8).sum(1, keepdim=True).clamp_min(0.5)).pow(0.125)


@final
class NormGrid(Grid):
    """Uniform grid whose bin size is a function of the tensor itself.

    Args:
        spec: bits, levels, channel axis.
        num_channels: size of the channel axis.
        mode: `max` or `norm`.
        block: number of elements that share a scale, 0 for a channel or the tensor.
        scale_gradient: whether the scale passes its gradient on to the tensor.
    """

    def __init__(
        self,
        spec: QuantSpec,
        num_channels: int = 1,
        *,
        mode: ModeName = "max",
        block: int = 0,
        scale_gradient: bool = True,
    ) -> None:
        super().__init__(spec, num_channels)
        self.mode: ModeName = mode
        self.block = block
        self.scale_gradient = scale_gradient
        # The fast path's integers have one step per channel. Levels of blocks have no common one, as with an offset.
        self.has_offset = block > 0

    def set_scale(self, scale: Tensor) -> None:
        """Nothing: the weights say."""

    def scale(self, x: Tensor) -> Tensor:
        """Bin size from `x`, with its gradient; for blocks in the shape of `x`."""
        top = self.limits.qmax - self.limits.zero_point or -self.limits.qmin
        axis = self.spec.channel_axis
        moved = x if axis is None else x.movedim(axis, 0)
        rows = moved.reshape(1 if axis is None else x.shape[axis], -1)
        if self.block and rows.shape[1] % self.block == 0:
            found = magnitude(rows.reshape(-1, self.block), self.mode).expand(-1, self.block).reshape(moved.shape)
            found = found if axis is None else found.movedim(0, axis)
            return F.positive(found / top)
        return self.per_channel(x, F.positive(magnitude(rows, self.mode) / top))

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x`; the gradient of the scale is in `decode`."""
        position = x / self.scale(x).detach() + self.limits.zero_point
        # On all grids but the signed one of one bit nothing lies outside but by rounding errors, so the gradient passes
        # everywhere: above all at the largest.
        return F.replace_value(position, torch.clamp(position.detach(), self.limits.qmin, self.limits.qmax))

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions; `sum g * (value - v)` to the scale."""
        scale = self.scale(x)
        fixed = scale.detach()
        if not self.scale_gradient:
            return F.decode(value, fixed, self.limits)
        # The second term is zero. LSQ's formula would take the largest weight, which is on the bound, for clipped.
        return F.decode(value, fixed, self.limits) + (value - v).detach() * (scale - fixed)


@final
class DelayedNoise(Rounding):
    """Forward `v + U(-1/2, 1/2)` from a given progress on, before that `v`; backward `g`."""

    reach = 1
    amplitude: Tensor

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.noise = NoiseSource()
        self.register_buffer("amplitude", torch.tensor(0.0))
        self.set_progress(0.0)

    def forward(self, v: Tensor) -> Tensor:
        """Add noise."""
        noise = self.noise.signed(v, self.amplitude.to(torch.float32))
        return F.replace_value(v, v.detach() + noise.to(v.dtype))

    def set_progress(self, progress: float) -> None:
        """Fresh noise, if any."""
        self.amplitude.fill_(0.5 if progress >= self.start else 0.0)
        self.noise.set_progress(progress)


@final
@dataclass(frozen=True)
class RAND(Method):
    """Noise on weights, at a scale that is a function of them; straight-through learned step for activations.

    Attributes:
        mode: `max` or `norm`.
        block: number of weights that share a scale; 0: a channel or the tensor, as the policy says, and so it is where
            the block does not divide them (27 weights of an image's layer).
        start: progress before which weights stay as they are.
        scale_gradient: whether the scale passes its gradient on to the weights; False only to compare with.
    """

    name: ClassVar[str] = "rand"
    mode: ModeName = "max"
    block: int = 0
    start: float = 0.0
    scale_gradient: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 0:
            raise ValueError(f"block must be 0 or more, got {self.block}.")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start is progress, 0 to 1, got {self.start}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The weights' own scale; for activations the learned step."""
        if kind == "activation":
            return LearnedStep(spec, num_channels, batched=True)
        return NormGrid(spec, num_channels, mode=self.mode, block=self.block, scale_gradient=self.scale_gradient)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Noise for weights; for activations straight through."""
        return StraightThrough() if kind == "activation" else DelayedNoise(self.start)
