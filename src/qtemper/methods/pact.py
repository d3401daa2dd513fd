"""Parameterized clipping activation (PACT).

Choi, Wang, Venkataramani, Chuang, Srinivasan and Gopalakrishnan, "PACT: Parameterized Clipping Activation for Quantized
Neural Networks", arXiv 1805.06085, 2018.

    activations   y = clamp(x, 0, alpha) = (|x| - |x - alpha| + alpha) / 2
                  x_hat = s * round(y / s),    s = alpha / (2^b - 1)
                  dL/dx = g * 1[0 <= x < alpha]
                  dL/dalpha = sum g * 1[x >= alpha]: no rounding residual, no normalisation
    weights       DoReFa's (qtemper/methods/dorefa.py)

Learned: `alpha`, one per activation tensor (the paper) or per channel.

Choices:
- At x = alpha exactly, x gets its gradient too, as everywhere here on a bound.
- Alpha starts on the outermost calibrated level. The paper starts at a large constant: `initial`.
- The paper's L2 term on alpha, lambda * alpha^2 with the weights' decay, is no part of the quantizer, and
  `qtemper.param_groups` puts quantizer parameters in a group without decay. To have it, move the parameters whose
  name ends in `grid.alpha` into a group with the weights' `weight_decay`; docs/methods/pact.md shows it.
- Inputs with negative values: alpha is the highest level, and the lowest one moves with it: -alpha * 2^(b-1) /
  (2^(b-1) - 1), which is -2 alpha at 2 bits. dL/dalpha gains g * (lowest level / alpha) where clipped below.
- Alpha is kept positive by the floor of docs/decisions/0003.
- Later versions of the paper quantize weights by SAWB; that is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.functional import Levels
from qtemper.methods.dorefa import TanhLevels
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class LearnedClip(Grid):
    """Uniform grid up to a learned clip value, which only clipped elements move.

    Args:
        spec: bits, levels, channel axis.
        num_channels: size of the channel axis.
        initial: first value of alpha; the calibrated one if None.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1, *, initial: float | None = None) -> None:
        super().__init__(spec, num_channels)
        self.initial = initial
        self.alpha = nn.Parameter(torch.ones(self.shape))

    def set_scale(self, scale: Tensor) -> None:
        """Put alpha on the outermost calibrated level, or on its initial value."""
        self.alpha.copy_(scale.clamp_min(F.SCALE_FLOOR) * self._bins())
        if self.initial is not None:
            self.alpha.fill_(self.initial)

    def scale(self, x: Tensor) -> Tensor:
        """Bin size, alpha over the number of bins below it."""
        return self.per_channel(x, F.positive(self.alpha) / self._bins())

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x`; the gradient of alpha is in `decode`."""
        return F.encode(x, self.scale(x).detach(), self.limits)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions, training alpha by the clipped ones."""
        scale = self.scale(v)
        position = v.detach()
        relative = position - self.limits.zero_point
        clipped = relative - F.keep_between(relative, position, self.limits.qmin, self.limits.qmax)
        # The last product is 0; its gradient is alpha's.
        return F.decode(value, scale.detach(), self.limits) + clipped * (scale - scale.detach())

    def _bins(self) -> float:
        """Number of bins between zero and alpha; on a grid without positive levels, to the lowest level."""
        qmin, qmax, zero_point = self.limits
        return (qmax - zero_point) or (zero_point - qmin)


@final
@dataclass(frozen=True)
class PACT(Method):
    """Learned clip for activations, DoReFa's weights, straight-through rounding.

    Attributes:
        initial: first value of alpha (8 or 10 in papers, 6 in a public code); None takes it from calibration.
        weight_scale: `unit`, DoReFa's weights in [-1, 1]; `real`, in [-M, M] with M = max|tanh(w)|.
    """

    name: ClassVar[str] = "pact"
    initial: float | None = None
    weight_scale: Literal["unit", "real"] = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial is not None and not 0 < self.initial < math.inf:
            raise ValueError(f"initial must be positive, or None for the calibrated value, got {self.initial}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """Tanh for weights, the learned clip for activations."""
        if kind == "weight":
            return TanhLevels(spec, num_channels, real=self.weight_scale == "real", exact=True)
        return LearnedClip(spec, num_channels, initial=self.initial)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()

    def default_levels(self, kind: TensorKind) -> Levels | Literal["auto"]:
        """DoReFa's symmetric levels for weights."""
        return "symmetric" if kind == "weight" else "auto"
