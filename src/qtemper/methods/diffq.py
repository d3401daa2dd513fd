"""DiffQ at a fixed bit width: pseudo quantization noise on weights, in a range that follows them.

Defossez, Adi and Synnaeve, "Differentiable Model Compression via Pseudo Quantization Noise", arXiv 2104.09987, 2021.

    training   w_hat = w + D * u,    D = (max w - min w) / (2^b - 1),    u ~ U(-1/2, 1/2) or N(0, 1) / 2, each step anew
    eval       w_hat = min w + D * round((w - min w) / D)
    backward   dL/dw = g + (sum g * u) * dD/dw,    dD/dw = +1 / (2^b - 1) at the maximum, - at the minimum, else 0

Learned: nothing but the weights; D is a function of them. The noise never decays.

Our reading:
- Learned bit widths, the paper's subject, are left out: this is its noise at the bits of the policy. Its groups of 8
  weights, which exist for them, are replaced by one range per tensor or per channel.
- The gradient through D is what remains of straight-through's in eval mode too, with round(v) - v for u.
- `noise="gaussian"` is the authors' code's default. Its standard deviation of 1/2 bin is sqrt(3) times that of
  `uniform`, whose variance is the rounding error's.
- The paper leaves activations in float. Here they are LSQ's, learned step and straight through, so that against `lsq`
  the weights alone differ; a fixed step would be a second difference.
- The calibrated scale of the weights is not used. A largest weight in a tensor is one of its levels, so nothing is
  ever clipped, and outliers make all bins wide: at 1 and 2 bits expect little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.counter import NoiseSource
from qtemper.methods.lsq import LearnedStep
from qtemper.methods.noise import UniformNoise
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class MinMax(Grid):
    """Uniform grid from the tensor's minimum to its maximum, which it follows and sends a gradient to."""

    has_offset = True

    def set_scale(self, scale: Tensor) -> None:
        """Nothing to take: the tensor itself gives the levels."""

    def scale(self, x: Tensor) -> Tensor:
        """Bin size of the tensor `x`, with its gradient to the extremes."""
        dims = F.other_dims(x, self.spec.channel_axis)
        width = F.positive(x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True))
        return width / (self.limits.qmax - self.limits.qmin)

    def encode(self, x: Tensor) -> Tensor:
        """Position of `x`; the bin size's gradient is in `decode`."""
        position = (x - self._lowest(x)) / self.scale(x).detach() + self.limits.qmin
        # Nothing lies outside but by rounding errors, so the gradient passes everywhere.
        return F.replace_value(position, torch.clamp(position.detach(), self.limits.qmin, self.limits.qmax))

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions; what the rounding added moves the extremes."""
        scale = self.scale(x)
        x_hat = (value - self.limits.qmin) * scale.detach() + self._lowest(x)
        # The last product is 0; its gradient is the bin size's.
        return x_hat + (value - v).detach() * (scale - scale.detach())

    def _lowest(self, x: Tensor) -> Tensor:
        return x.detach().amin(F.other_dims(x, self.spec.channel_axis), keepdim=True)


@final
class GaussianNoise(Rounding):
    """Forward `v + N(0, 1) / 2`, backward `g`."""

    reach = 3  # the normal numbers stay below 5.2

    def __init__(self) -> None:
        super().__init__()
        self.noise = NoiseSource()

    def forward(self, v: Tensor) -> Tensor:
        """Add noise."""
        return F.replace_value(v, v.detach() + (0.5 * self.noise.gaussian(v)).to(v.dtype))

    def set_progress(self, progress: float) -> None:
        """Fresh noise."""
        self.noise.set_progress(progress)


@final
@dataclass(frozen=True)
class DiffQ(Method):
    """Noise on weights in their own range; LSQ's activations.

    Attributes:
        noise: `gaussian` (standard deviation 1/2 bin) or `uniform` (in half a bin on either side).
    """

    name: ClassVar[str] = "diffq"
    noise: Literal["gaussian", "uniform"] = "gaussian"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The weights' own range; a learned step for activations."""
        if kind == "weight":
            return MinMax(spec, num_channels)
        return LearnedStep(spec, num_channels, batched=True)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Noise on weights, straight through on activations."""
        if kind == "activation":
            return StraightThrough()
        return GaussianNoise() if self.noise == "gaussian" else UniformNoise(on_codes=True)
