"""StableQAT: LSQ with a Fourier surrogate of the rounding's derivative.

Microsoft, "StableQAT", arXiv 2601.19320, 2026.

    forward    x_hat = s * (round(v) - z),    v = clamp(x / s + z, qmin, qmax)
    backward   dL/dx = g * rho inside the range, 0 outside;    dL/ds as in LSQ
               rho = (1 - h) / (1 + h),    h = sqrt(2) * pi * sum_i A_i * cos((2 i + 1) * pi * (v + round(v)))

The staircase, turned by 45 degrees, is a triangle wave; a sine series of that wave, turned back, has the slope rho.
Because round(v) is an integer, the cosine is that of (2 i + 1) * pi * (v - round(v)): with one term and A = 0.21, rho
is 0.035 on a grid point and 1 on a bin edge. A = 0 is the straight-through estimator, to the bit.

Learned: `s`, by LSQ's gradient.

Our reading:
- Amplitudes of the higher terms: `A_i = (-1)^i * A / (2 i + 1)`, the proportions of the triangle wave's series (whose
  derivative is a square wave), so that A stays the one strength. The source read gives one amplitude for one term.
- `1 + h` and `1 - h` stay positive, and rho in (0, 1], for 0 <= A < 1 / (sqrt(2) * pi) = 0.225 and any number of terms.
- The source trains the weights of language models. So `on="weights"`; activations are then straight through. The mean
  of rho over a bin is 0.30 at A = 0.21, which a chain of activations would multiply up.
- v is the position with the zero point in it: rho is 1 on a bin edge on every kind of grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper.methods.lsq import LearnedStep
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind

AMPLITUDE_MAX = 1 / (math.sqrt(2.0) * math.pi)
"""Amplitude at which the slope on a grid point is 0."""


class _RoundFourier(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, strength: Tensor, order: int) -> Tensor:
        return torch.round(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        v, strength, ctx.order = inputs
        ctx.save_for_backward(v, strength)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        v, strength = ctx.saved_tensors
        return grad * slope(v, strength, ctx.order), None, None


def slope(v: Tensor, strength: Tensor, order: int) -> Tensor:
    """`rho` at positions `v`.

    Args:
        v: position on the grid, in bins.
        strength: `sqrt(2) * pi * A`, shape ().
        order: number of terms.
    """
    angle = (v - torch.round(v)) * 3.141592653589793
    wave = torch.cos(angle)
    for i in range(1, order):
        wave = wave + torch.cos(angle * (2 * i + 1)) * ((-1) ** i / (2 * i + 1))
    h = strength * wave
    return (1 - h) / (1 + h)


@final
class FourierRounding(Rounding):
    """Forward `round(v)`, backward `g * rho`.

    Args:
        amplitude: of the first term.
        order: number of terms.
    """

    integral = True
    strength: Tensor

    def __init__(self, amplitude: float, order: int) -> None:
        super().__init__()
        self.order = order
        # A hyperparameter, not state: a checkpoint does not change it.
        self.register_buffer("strength", torch.tensor(amplitude / AMPLITUDE_MAX), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        """Round; shape the gradient."""
        result: Tensor = _RoundFourier.apply(v, self.strength.to(v.dtype), self.order)  # type: ignore[no-untyped-call]
        return result


@final
@dataclass(frozen=True)
class StableQAT(Method):
    """Learned step, hard rounding forward, the slope of a Fourier series backward.

    Attributes:
        amplitude: of the first term, in [0, 0.225); 0 is LSQ.
        order: number of terms, 1 to 16.
        on: the tensors whose gradient is shaped: `weights`, `activations` or `both`.
    """

    name: ClassVar[str] = "stable"
    amplitude: float = 0.21
    order: int = 1
    on: Literal["weights", "activations", "both"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.amplitude < AMPLITUDE_MAX:
            raise ValueError(
                f"amplitude must be in [0, {AMPLITUDE_MAX:.4f}), where the slope stays positive, got {self.amplitude}."
            )
        if not 1 <= self.order <= 16:
            raise ValueError(f"order must be 1 to 16 terms, got {self.order}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """The shaped gradient, where it is wanted."""
        which = "weights" if kind == "weight" else "activations"
        return FourierRounding(self.amplitude, self.order) if self.on in ("both", which) else StraightThrough()
