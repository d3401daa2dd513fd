"""Straight-through estimator on a fixed grid.

Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", arXiv 1308.3432, 2013; its use in quantization-aware training: Hubara et al., arXiv 1609.07061.

    forward    x_hat = s * (round(v) - z),    v = clamp(x / s + z, qmin, qmax)
    backward   dL/dx = g inside the range, 0 outside;    s gets no gradient

Learned: nothing. The bin size `s` is the calibrated one and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class FixedStep(Grid):
    """Uniform grid whose bin size is set at calibration and not learned.

    Args:
        spec: bits, levels, channel axis.
        num_channels: size of the channel axis.
        outermost: magnitude of the outermost level, whatever the calibrated bin size; None takes that.
    """

    step: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1, *, outermost: float | None = None) -> None:
        super().__init__(spec, num_channels)
        self.outermost = outermost
        self.register_buffer("step", torch.ones(self.shape))

    def set_scale(self, scale: Tensor) -> None:
        """Take the calibrated bin size."""
        self.step.copy_(scale.clamp_min(F.SCALE_FLOOR))
        if self.outermost is not None:
            qmin, qmax, zero_point = self.limits
            self.step.fill_(self.outermost / max(qmax - zero_point, zero_point - qmin))

    def scale(self, x: Tensor) -> Tensor:
        """The calibrated bin size, broadcastable to `x`."""
        return self.per_channel(x, self.step)

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x` on the grid."""
        return F.encode(x, self.scale(x), self.limits)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions."""
        return F.decode(value, self.scale(v), self.limits)


@final
class StraightThrough(Rounding):
    """Forward `round(v)`, backward `g`."""

    integral = True

    def forward(self, v: Tensor) -> Tensor:
        """Round, straight through."""
        return F.round_ste(v)


@final
@dataclass(frozen=True)
class STE(Method):
    """Straight-through estimator on the calibrated grid, for weights and activations."""

    name: ClassVar[str] = "ste"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The calibrated grid."""
        return FixedStep(spec, num_channels)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()
