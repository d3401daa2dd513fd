"""PQDE's arctangent soft round: rounding that hardens while training goes on.

Yue, Wu, Ma, Fu and Sham, "PQDE: Comprehensive Progressive Quantization with Discretization Error for Ultra-Low Bitrate
MobileNet towards Low-Resolution Imagery", IEEE AICAS 2024.

Stated: a quantizer that minimises the discretization error, an arctangent soft round in the forward pass, a
progressive schedule of bits. Our reading of the first two, everything below (no code was available):

    training   x_hat = s * (r(v) - z),    v = clamp(x / s + z, qmin, qmax)
               r(v) = floor(v) + 1/2 + atan(k * f) / (2 * atan(k / 2)),    f = v - floor(v) - 1/2
    eval       x_hat = s * (round(v) - z)
    backward   dL/dx = g inside the range, 0 outside; with `gradient="soft"` g * r'(v),
               r'(v) = k / (2 * atan(k / 2) * (1 + k^2 f^2))
               dL/ds = c * sum g * (r(v) - v) inside,  g * (qmin or qmax - z) where clipped;  c as in LSQ
    k          a schedule over progress, k -> 0 being r(v) = v; from `hard_from` on r = round, straight through

r is continuous, keeps codes where they are, and has the mean slope 1 in every bin.

Learned: `s`, by LSQ's gradient.

Choices:
- The quantizer that minimises discretization error is part of the forward pass in the abstract, and aimed at weights
  near zero. What it is there is not public; here only the calibration's `mse` observer (the default), which sets the
  first `s`, minimises anything.
- The gradient is straight through: the record speaks of the forward pass only. The soft round's own has the mean 1 but
  a mean square that grows with k (1.5 at k = 6, 3.6 at 20), and depth multiplies it: in the reduced MobileNetV2 the
  first convolution's gradient grows 70-fold by k = 10 and 10^8-fold by k = 100, and training collapses.
- The stages of falling bits are `Experiment.stages`, for any method: runs of their own, each from the latent weights of
  the one before; k begins anew in each. The recipes go from float over 8 and 6 to 4 bits, and on to 2 (the paper's are
  not public).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.methods.lsq import LearnedStep
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind
from qtemper.schedules import Exponential, Schedule


def soft_round(v: Tensor, sharpness: Tensor) -> Tensor:
    """`floor(v) + 1/2 + atan(k f) / (2 atan(k / 2))`, with autograd's gradient to `v`.

    Args:
        v: positions, in bins.
        sharpness: k > 0, shape ().
    """
    low = torch.floor(v.detach())
    return low + 0.5 + torch.atan(sharpness * (v - low - 0.5)) / (2 * torch.atan(sharpness / 2))


@final
class SoftRounding(Rounding):
    """Arctangent soft round; `round`, straight through, once it is hard.

    Args:
        sharpness: schedule of k over training progress.
        hard_from: progress from which rounding is hard.
        straight: whether the gradient passes unchanged from the beginning.
    """

    sharpness: Tensor

    def __init__(self, sharpness: Schedule, hard_from: float, *, straight: bool) -> None:
        super().__init__()
        self.schedule = sharpness
        self.hard_from = hard_from
        self.straight = straight
        # Infinite where rounding is hard.
        self.register_buffer("sharpness", torch.tensor(0.0))
        self.set_progress(0.0)

    def forward(self, v: Tensor) -> Tensor:
        """Round softly."""
        hard = torch.isinf(self.sharpness)
        k = torch.where(hard, 1.0, self.sharpness).to(v.dtype)
        soft = soft_round(v, k)
        if self.straight:
            soft = F.replace_value(v, soft.detach())
        return torch.where(hard, F.round_ste(v), soft)

    def set_progress(self, progress: float) -> None:
        """Set the sharpness."""
        self.sharpness.fill_(math.inf if progress >= self.hard_from else self.schedule(progress))


@final
@dataclass(frozen=True)
class PQDE(Method):
    """Learned step, arctangent soft round, for weights and activations.

    Attributes:
        sharpness: schedule of k over training progress, above zero.
        hard_from: progress from which rounding is hard.
        gradient: `straight`, or `soft`, the soft round's own, for few layers or a small sharpness.
    """

    name: ClassVar[str] = "pqde"
    sharpness: Schedule = Exponential(start=1.0, end=100.0)
    hard_from: float = 0.9
    gradient: Literal["soft", "straight"] = "straight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sharpness(0.0) > 0 or not self.sharpness(1.0) > 0:
            raise ValueError(
                f"sharpness must be above 0, got {self.sharpness(0.0)} at the start and {self.sharpness(1.0)} at the "
                "end; a small one, as 0.01, is as good as no rounding."
            )
        if not 0 <= self.hard_from <= 1:
            raise ValueError(f"hard_from is progress, 0 to 1, got {self.hard_from}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Soft round."""
        return SoftRounding(self.sharpness, self.hard_from, straight=self.gradient == "straight")
