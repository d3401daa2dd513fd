"""Plain additive uniform noise: the pseudo-quantization noise of the UNIQ / DiffQ / NIPQ family.

Baskin et al., "UNIQ", arXiv 1804.10969; Defossez et al., "DiffQ", arXiv 2104.09987; Shin et al., "NIPQ",
CVPR 2023. What they share, at a fixed bit width and on a uniform grid:

    training   x_hat = s * (v + zeta - z),    v = clamp(x / s + z, qmin, qmax)
               zeta ~ U(-1/2, 1/2),    0 where v is a code
    eval       x_hat = s * (round(v) - z)
    backward   dL/dx = g inside the range, 0 outside;    dL/ds = LSQ's with zeta for round(v) - v

Learned: `s`, by LSQ's gradient. The noise has the variance of a quantization error that is uniform in its bin
(1/12), is blind to the element's own error, and never decays: the baseline that noise tempering improves on.

Our reading: the papers' own ranges (min/max, softplus-learned clip) and learned bit widths are left out, so that
against `lsq` and `tempering` exactly one thing differs. On a code are clipped elements and a ReLU's zeros, which get no
noise in NIPQ's code either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.counter import NoiseSource
from qtemper.methods.lsq import LearnedStep
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class UniformNoise(Rounding):
    """Forward `v + U(-1/2, 1/2)`, backward `g`.

    Args:
        on_codes: add it where `v` is a code, too.
    """

    reach = 1

    def __init__(self, *, on_codes: bool) -> None:
        super().__init__()
        self.on_codes = on_codes
        self.noise = NoiseSource()

    def forward(self, v: Tensor) -> Tensor:
        """Add noise."""
        fixed = v.detach()
        noise = self.noise.signed(v, 0.5).to(v.dtype)
        if not self.on_codes:
            noise = torch.where(fixed == torch.round(fixed), 0.0, noise)
        return F.replace_value(v, fixed + noise)

    def set_progress(self, progress: float) -> None:
        """Fresh noise."""
        self.noise.set_progress(progress)


@final
@dataclass(frozen=True)
class Noise(Method):
    """Learned step, additive uniform noise instead of rounding, for weights and activations."""

    name: ClassVar[str] = "noise"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Additive noise."""
        return UniformNoise(on_codes=False)
