"""Learned step size quantization (LSQ).

Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.

    forward    x_hat = s * (round(v) - z),    v = clamp(x / s + z, qmin, qmax)
    backward   dL/dx = g inside the range, 0 outside                                                    (eq. 5)
               dL/ds = c * sum g * (round(v) - v) inside,  g * (qmin or qmax - z) where clipped         (eq. 3)
               c = 1 / sqrt(N * Q_P),    N elements share the step                                      (sec. 2.2)

Learned: `s`, one per tensor (the paper) or per channel.

Choices:
- N is the number of weights, or for an activation the number of features of one sample, as in the paper; several
  public codes multiply it by the batch size.
- Q_P is `qmax`; where that is 0 (one bit, which the paper does not treat) it is `|qmin|`.
- 1-bit weights use the symmetric grid, +-s/2.
- The step is `max(step, 1e-8)` with the gradient passed on, so that it cannot turn negative (docs/decisions/0003).
- The paper's initialisation, `s = 2 * mean|x| / sqrt(Q_P)`, is `calibrate(..., observer="lsq")`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class LearnedStep(Grid):
    """Uniform grid whose bin size is trained by LSQ's gradient.

    Args:
        spec: bits, levels, channel axis.
        num_channels: size of the channel axis.
        batched: whether dimension 0 of the tensor is the batch, which then does not count in N.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1, *, batched: bool) -> None:
        super().__init__(spec, num_channels)
        self.batched = batched
        self.step = nn.Parameter(torch.ones(self.shape))

    def set_scale(self, scale: Tensor) -> None:
        """Take the calibrated bin size."""
        self.step.copy_(scale.clamp_min(F.SCALE_FLOOR))

    def scale(self, x: Tensor) -> Tensor:
        """The learned bin size, broadcastable to `x`."""
        return self.per_channel(x, F.positive(self.step))

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x`; the gradient of the step is in `decode`."""
        with torch.no_grad():
            scale = self.scale(x)
        return F.encode(x, scale, self.limits)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions, training the step."""
        scale = F.scale_gradient(self.scale(v), self.gradient_scale(v))
        return F.decode_learned_step(value, v, scale, self.limits)

    def gradient_scale(self, v: Tensor) -> float:
        """`1 / sqrt(N * Q_P)`."""
        count = F.elements_per_scale(v, self.spec.channel_axis, batched=self.batched)
        return 1.0 / math.sqrt(count * (self.limits.qmax or -self.limits.qmin))


@final
@dataclass(frozen=True)
class LSQ(Method):
    """Learned step, straight-through rounding, for weights and activations."""

    name: ClassVar[str] = "lsq"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()
