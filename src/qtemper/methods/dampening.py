"""Dampening of weight oscillations, added to any method.

Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv 2203.11086.

    loss       L + lambda_t * sum (sg[w_hat] - clip(w))^2 over all weights,  sg: no gradient
    backward   dL/dw = dL/dw of the method + 2 * lambda_t * (clip(w) - w_hat) inside the range, + 0 outside
    lambda_t   half a cosine over training progress, from 0 to lambda

w_hat is the hard quantizer's value. Forward, activations, roundings and everything learned are the base method's.

Learned: what the base method learns; the term has no gradient for the step, as in the paper.

Choices:
- The term is added in the backward pass, where the weight enters its grid, so that losses and training loops stay what
  they are. The loss that they show is without it; a loop that scales its loss must know that the term is not scaled,
  and each forward pass of a layer adds it once (two micro-batches: twice).
- The sum is over a tensor's elements and over tensors, in the weights' own unit, as in the authors' code.
- The range is the grid's, from its lowest level to its highest.
- On DoReFa's and PACT's grids the error is that of tanh(w), without the slope of tanh; in unit scale of tanh(w) / M,
  which pulls harder by 1 / M.
- The paper's other remedy, freezing weights that oscillate, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper.functional import Levels
from qtemper.methods.lsq import LSQ
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind
from qtemper.schedules import Cosine, Schedule


class _AddGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gradient: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # An input, so that second derivatives know its graph.
        ctx.save_for_backward(inputs[1])
        ctx.added = False

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():  # where there is no second backward pass
            # A second derivative comes through here again, and the term is in the first already.
            if ctx.added:
                return grad, None
            ctx.added = True
        return grad + gradient, None


@final
class DampenedGrid(Grid):
    """Another grid, whose input gets the gradient of `strength * sum (sg[x_hat] - clip(x))^2` in training.

    Args:
        base: the grid.
        strength: schedule of lambda over training progress.
        num_channels: size of the channel axis.
    """

    strength: Tensor

    def __init__(self, base: Grid, strength: Schedule, num_channels: int = 1) -> None:
        super().__init__(base.spec, num_channels)
        self.base = base
        self.schedule = strength
        self.has_offset = base.has_offset
        self.register_buffer("strength", torch.tensor(strength(0.0)))

    def set_scale(self, scale: Tensor) -> None:
        """Calibrate the base grid."""
        levels = self.levels
        assert levels != "auto"
        self.base.initialize(levels, scale)

    def reset(self) -> None:
        """Forget the calibration."""
        super().reset()
        self.base.reset()

    def scale(self, x: Tensor) -> Tensor:
        """The base grid's bin size."""
        return self.base.scale(x)

    def encode(self, x: Tensor) -> Tensor:
        """The base grid's position; adds the term's gradient to that of `x`."""
        if self.training:
            v = self.base.encode(x)
            # Zero where clipped: there the position is a code.
            error = (v - torch.round(v).detach()) * self.base.scale(x).detach()
            result: Tensor = _AddGradient.apply(x, 2 * self.strength.to(x.dtype) * error)  # type: ignore[no-untyped-call]
            x = result
        return self.base.encode(x)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The base grid's values."""
        return self.base.decode(value, v, x)

    def set_progress(self, progress: float) -> None:
        """Set lambda."""
        self.strength.fill_(self.schedule(progress))
        self.base.set_progress(progress)


@final
@dataclass(frozen=True)
class Dampening(Method):
    """Another method with oscillations of its weights dampened.

    Attributes:
        base: the method.
        strength: schedule of lambda over training progress.
    """

    name: ClassVar[str] = "dampening"
    base: Method = LSQ()
    strength: Schedule = Cosine(start=0.0, end=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, Dampening):
            raise ValueError("base is dampening itself; name the method to be dampened.")
        if self.strength(0.0) < 0 or self.strength(1.0) < 0:
            raise ValueError(f"strength must be 0 or more, got {self.strength(0.0)} to {self.strength(1.0)}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The base method's grid, dampened for weights."""
        grid = self.base.grid(kind, spec, num_channels)
        return DampenedGrid(grid, self.strength, num_channels) if kind == "weight" else grid

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """The base method's."""
        return self.base.rounding(kind, spec)

    def default_levels(self, kind: TensorKind) -> Levels | Literal["auto"]:
        """The base method's."""
        return self.base.default_levels(kind)
