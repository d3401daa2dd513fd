"""DoReFa: weights through tanh, activations clipped to [0, 1], nothing learned.

Zhou, Wu, Ni, Zhou, Wen and Zou, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", arXiv 1606.06160, 2016. Their quantized gradients are left out.

With quant_b(u) = round((2^b - 1) u) / (2^b - 1):

    weights, b > 1    w_hat = 2 * quant_b(tanh(w) / (2 M) + 1/2) - 1,    M = max|tanh(w)|
                      dL/dw = g * (1 - tanh(w)^2) / M, and at the largest weight the gradient of M besides
    weights, b = 1    w_hat = sign(w) * E|w|,    dL/dw = g everywhere
    activations       x_hat = quant_b(clamp(x, 0, 1)),    dL/dx = g inside [0, 1], 0 outside

On our grids: the weights' levels are the symmetric grid with s = 2 / (2^b - 1) and v = tanh(w) / (M s) - 1/2, in one
bit s = 2 E|w|; the activations' the unsigned grid with s = 1 / (2^b - 1).

Learned: nothing.

Choices:
- Calibration settles whether an input is signed; its scale is not used, because the paper's levels are fixed. So
  quantized weights lie in [-1, 1] whatever the float ones were (against docs/decisions/0002): batch norm has to be
  re-estimated or trained, and without one the layer changes by a factor. `scale="real"` multiplies the weights by M
  and clips activations at the calibrated range.
- `maximum="exact"` differentiates M, as the formula says; `"constant"` does not, as common PyTorch codes. Where batch
  norm follows, the two differ little at many bits: M's gradient is sum g * v but for a factor, v the unrounded weights,
  and sum g * w_hat is then 0.
- In one bit the clipping-free gradient is the paper's, and E|w| gets none.
- Inputs with negative values, which the paper does not treat, are clipped to the signed grid's
  [-1, 1 - 2^(1-b)], in one bit to [-1, 1].
- sign(0) is +1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.functional import Levels
from qtemper.methods.ste import FixedStep, StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


def unit_step(grid: Grid) -> float:
    """Bin size of a grid whose outermost level is 1 or -1."""
    qmin, qmax, zero_point = grid.limits
    return 1.0 / max(qmax - zero_point, zero_point - qmin)


@final
class TanhLevels(Grid):
    """DoReFa's weights: tanh, divided by its largest magnitude; in one bit +-E|w|.

    Args:
        spec: bits, levels, channel axis.
        num_channels: size of the channel axis.
        real: whether the levels span [-M, M], or [-1, 1].
        exact: whether the largest magnitude M has a gradient.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1, *, real: bool, exact: bool) -> None:
        super().__init__(spec, num_channels)
        self.real = real
        self.exact = exact

    def set_scale(self, scale: Tensor) -> None:
        """Nothing to take: the weights themselves give the levels."""

    def scale(self, x: Tensor) -> Tensor:
        """Bin size of the tensor `x`."""
        if self.spec.bits == 1:
            mean = x.detach().abs().mean(F.other_dims(x, self.spec.channel_axis), keepdim=True)
            return F.positive(mean * unit_step(self))
        if self.real:
            return self._largest(torch.tanh(x)) * unit_step(self)
        return x.new_full([1] * x.dim(), unit_step(self))

    def encode(self, x: Tensor) -> Tensor:
        """Position of `tanh(x) / M`, or in one bit of `x`, whose gradient is not cut at the bounds."""
        if self.spec.bits == 1:
            position = x / self.scale(x)
            value = position.detach() + self.limits.zero_point
            return F.replace_value(position, torch.clamp(value, self.limits.qmin, self.limits.qmax))
        t = torch.tanh(x)
        # A quotient: the largest weight comes to lie exactly on the outermost level, not beyond it.
        position = t / self._largest(t) * (1.0 / unit_step(self)) + self.limits.zero_point
        return F.clamp(position, self.limits.qmin, self.limits.qmax)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions."""
        return F.decode(value, self.scale(x), self.limits)

    def _largest(self, t: Tensor) -> Tensor:
        largest = F.positive(t.abs().amax(F.other_dims(t, self.spec.channel_axis), keepdim=True))
        return largest if self.exact else largest.detach()


@final
@dataclass(frozen=True)
class DoReFa(Method):
    """Weights through tanh, activations clipped to [0, 1], straight-through rounding.

    Attributes:
        scale: `unit`, the paper's [-1, 1] and [0, 1]; `real`, weights times M and activations clipped where
            calibration says.
        maximum: whether M = max|tanh(w)| has a gradient (`exact`) or none (`constant`).
    """

    name: ClassVar[str] = "dorefa"
    scale: Literal["unit", "real"] = "unit"
    maximum: Literal["exact", "constant"] = "exact"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """Tanh for weights, a fixed range for activations."""
        if kind == "weight":
            return TanhLevels(spec, num_channels, real=self.scale == "real", exact=self.maximum == "exact")
        return FixedStep(spec, num_channels, outermost=1.0 if self.scale == "unit" else None)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()

    def default_levels(self, kind: TensorKind) -> Levels | Literal["auto"]:
        """The paper's symmetric levels for weights."""
        return "symmetric" if kind == "weight" else "auto"
