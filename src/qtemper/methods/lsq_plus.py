"""LSQ+: learned step size quantization with a learned offset.

Bhalgat, Lee, Nagel, Blankevoort and Kwak, "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR Workshops 2020, arXiv 2004.09576.

    activations   x_hat = s * q + beta,    q = round(v),    v = clamp((x - beta) / s, 0, n),    n = 2^b - 1
                  dL/dx = g inside the range, 0 outside
                  dL/ds = c * sum g * (q - v) inside,  g * (0 or n) where clipped
                  dL/dbeta = c * sum g where clipped, 0 inside
                  c = 1 / sqrt(N * n),    N elements of one sample share the step
    weights       LSQ's, without an offset (qtemper/methods/lsq.py)

Learned: `s` and, of activations, `beta` (`offset`); one per tensor (the paper) or per channel.

Choices:
- Codes keep our ranges: on a signed grid they are `q + qmin`, so that q = 0 is the lowest code in either case.
- Beta starts where the calibrated grid without an offset begins: 0 for inputs that are nowhere negative, else the
  lowest level. The paper chooses s and beta of activations by least squares on the first batches, and of weights
  s = max|mean +- 3 std| / 2^(b-1); here s comes from the observer (`mse`: least squares over s alone).
- The gradient scale c is LSQ's, for both parameters, with n for Q_P.
- Zeros that a convolution pads with need not lie on the grid; they stay zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.functional import CodeRange
from qtemper.methods.lsq import LearnedStep
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class LearnedStepAndOffset(Grid):
    """Uniform grid `s * q + beta` for activations, both trained by LSQ+'s gradients; dimension 0 is the batch."""

    has_offset = True

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.step = nn.Parameter(torch.ones(self.shape))
        self.offset = nn.Parameter(torch.zeros(self.shape))

    def set_scale(self, scale: Tensor) -> None:
        """Take the calibrated bin size; begin where the calibrated grid begins."""
        self.step.copy_(scale.clamp_min(F.SCALE_FLOOR))
        self.offset.copy_((self.limits.qmin - self.limits.zero_point) * scale)

    def scale(self, x: Tensor) -> Tensor:
        """The learned bin size, broadcastable to `x`."""
        return self.per_channel(x, F.positive(self.step))

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x - beta`; the gradients of the step and of beta are in `decode`."""
        offset = self.per_channel(x, self.offset).detach()
        return F.encode(x - offset, self.scale(x).detach(), self._from_zero())

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """`s * q + beta`, training both."""
        codes, factor = self._from_zero(), self.gradient_scale(v)
        offset = F.scale_gradient(self.per_channel(v, self.offset), factor)
        x_hat = F.decode_learned_step(value, v, F.scale_gradient(self.scale(v), factor), codes) + offset.detach()
        clipped = 1 - F.keep_between(torch.ones_like(v), v.detach(), codes.qmin, codes.qmax)
        # The last product is 0; its gradient is beta's.
        return x_hat + clipped * (offset - offset.detach())

    def gradient_scale(self, v: Tensor) -> float:
        """`1 / sqrt(N * n)`."""
        count = F.elements_per_scale(v, self.spec.channel_axis, batched=True)
        return 1.0 / math.sqrt(count * (self.limits.qmax - self.limits.qmin))

    def _from_zero(self) -> CodeRange:
        """Our codes, with the lowest one standing for zero, that is for beta."""
        qmin, qmax, _ = self.limits
        return CodeRange(qmin, qmax, float(qmin))


@final
@dataclass(frozen=True)
class LSQPlus(Method):
    """Learned step, for activations a learned offset besides; straight-through rounding."""

    name: ClassVar[str] = "lsq_plus"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step, and the offset of activations."""
        if kind == "weight":
            return LearnedStep(spec, num_channels, batched=False)
        return LearnedStepAndOffset(spec, num_channels)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()
