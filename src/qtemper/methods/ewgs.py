"""Element-wise gradient scaling (EWGS).

Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903.

    forward    x_hat = s * (round(v) - z)
    backward   dL/dx = g * (1 + delta * sign(g) * (v - round(v))) inside the range, 0 outside
    delta      max(0, (Tr(H) / N) / (3 * std(g))) every few epochs, H by Hutchinson; or fixed, their ablation

Units: the paper's error and delta live in a domain normalised to [0, 1]. Here errors are in bins, so a delta of the
paper becomes `delta / (2**bits - 1)`; the Hessian rule gives the same factor in either unit.

Learned: the step `s` (`grid_kind="step"`, by LSQ's gradient), or the interval's bounds `l`, `u`
(`grid_kind="bounds"`, the paper's parametrisation, by plain autograd through `x_n = clamp((x - l) / (u - l), 0, 1)`,
the factor included). Weights use the symmetric grid, the paper's. `calibrate(..., observer="ewgs")` is the authors'
initialisation.

Deviations:
- The paper leaves quantized tensors in [-1, 1] and [0, 1] and multiplies a layer's output by a learned scale; here both
  tensors keep their real scale, so that a calibrated network is close to the float one at once and signed inputs work
  (docs/decisions/0002). With `bounds` at +-3 standard deviations it is not close, above all at 1 bit: then calibrate
  with batch norm.
- `grid_kind="step"`, the default, is LSQ's grid, for comparisons in which only the backward pass differs.
- `tempering` has delta in 1 / bins, `delta_weight` and `delta_activation` here are in the paper's unit.
- Delta stays 0 until the Hessian is measured: by `fit` every `curvature_every` epochs, in a loop of one's own by
  `update_curvature`.
- The Hessian is that of the network in eval mode, and its mean is divided by the mean of std(g) over the batches; the
  authors use batch statistics and the mean of the quotients (their code). Delta stays below 1.99.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.functional import Levels
from qtemper.methods.lsq import LearnedStep
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind

DELTA_MAX = 1.99
"""Delta stays below 2 bins^-1, where `1 + delta * sign(g) * e` could turn negative for |e| = 1/2."""

DELTA_FIXED = 1e-3
"""The constant of the authors' ablation, in the paper's [0, 1] domain."""


class Delta(nn.Module, ABC):
    """The strength of the gradient scaling of one quantizer, in 1 / bins, and the rule that sets it."""

    wants_curvature: bool = False

    @abstractmethod
    def forward(self) -> Tensor:
        """Current delta, shape (), no gradient."""

    def set_curvature(self, mean_diagonal: float, gradient_std: float) -> None:
        """Take a Hessian estimate, per bin."""


@final
class FixedDelta(Delta):
    """A constant."""

    value: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        if not 0 <= value < 2:
            raise ValueError(f"delta must be in [0, 2) in units of 1 / bins, got {value}.")
        # A hyperparameter, not state: a checkpoint does not change it.
        self.register_buffer("value", torch.tensor(value), persistent=False)

    def forward(self) -> Tensor:
        """The constant."""
        return self.value


@final
class HessianDelta(Delta):
    """`max(0, (Tr(H) / N) / (3 * std(g)))`, set from outside every few epochs; `value` until then."""

    value: Tensor
    wants_curvature = True

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self) -> Tensor:
        """The last update's value."""
        return self.value

    def set_curvature(self, mean_diagonal: float, gradient_std: float) -> None:
        """Update delta (eq. 11)."""
        self.value.fill_(delta_from_curvature(mean_diagonal, gradient_std))


def delta_from_curvature(mean_diagonal: float, gradient_std: float) -> float:
    """EWGS's strength from the mean Hessian diagonal and the gradient's standard deviation, both per bin."""
    if gradient_std <= 0:
        return 0.0
    return min(max(mean_diagonal / (3 * gradient_std), 0.0), DELTA_MAX)


@final
class GradientScaling(Rounding):
    """Forward `round(v)`, backward `g * (1 + delta * sign(g) * (v - round(v)))`."""

    integral = True

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta
        self.wants_curvature = delta.wants_curvature

    def forward(self, v: Tensor) -> Tensor:
        """Round; scale the gradient."""
        return F.elementwise_gradient_scaling(v, torch.round(v), self.delta().to(v.dtype))

    def set_curvature(self, mean_diagonal: float, gradient_std: float) -> None:
        """Pass the estimate to the rule."""
        self.delta.set_curvature(mean_diagonal, gradient_std)


@final
class LearnedBounds(Grid):
    """Uniform grid between learned bounds: levels at `lower + k * (upper - lower) / (2**b - 1)`."""

    has_offset = True

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.lower = nn.Parameter(torch.zeros(self.shape))
        self.upper = nn.Parameter(torch.ones(self.shape))

    def set_scale(self, scale: Tensor) -> None:
        """Put the bounds on the outermost levels of the calibrated grid."""
        self.lower.copy_((self.limits.qmin - self.limits.zero_point) * scale)
        self.upper.copy_((self.limits.qmax - self.limits.zero_point) * scale)

    def scale(self, x: Tensor) -> Tensor:
        """Bin size, `(upper - lower) / (2**b - 1)`, kept positive."""
        width = F.positive(self.upper - self.lower)
        return self.per_channel(x, width / (self.limits.qmax - self.limits.qmin))

    def encode(self, x: Tensor) -> Tensor:
        """`(2**b - 1) * clamp((x - lower) / (upper - lower), 0, 1) + qmin`, autograd's gradient to the bounds."""
        position = (x - self.per_channel(x, self.lower)) / self.scale(x)
        return torch.clamp(position + self.limits.qmin, self.limits.qmin, self.limits.qmax)

    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """`(value - qmin) * scale + lower`."""
        return (value - self.limits.qmin) * self.scale(v) + self.per_channel(v, self.lower)


@final
@dataclass(frozen=True)
class EWGS(Method):
    """Element-wise gradient scaling.

    Attributes:
        grid_kind: `step` (learned step) or `bounds` (learned bounds, the paper's parametrisation).
        rule: `hessian` (delta starts at 0, the straight-through estimator, as in the authors' code) or `fixed`.
        delta_weight: delta of the weights, in the paper's [0, 1] domain, for `rule="fixed"`; None is `DELTA_FIXED`.
        delta_activation: delta of the activations, likewise.

    Raises:
        ValueError: a delta is negative, or given where the rule would not look at it; an unknown rule or kind of grid.
    """

    name: ClassVar[str] = "ewgs"
    grid_kind: Literal["step", "bounds"] = "step"
    rule: Literal["fixed", "hessian"] = "hessian"
    delta_weight: float | None = None
    delta_activation: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(delta is not None and delta < 0 for delta in (self.delta_weight, self.delta_activation)):
            raise ValueError("delta_weight and delta_activation must not be negative.")
        if self.rule == "hessian" and (self.delta_weight, self.delta_activation) != (None, None):
            raise ValueError(
                "rule='hessian' measures delta: leave out delta_weight and delta_activation, or set rule='fixed'."
            )

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """Learned step or learned bounds."""
        if self.grid_kind == "bounds":
            return LearnedBounds(spec, num_channels)
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Gradient scaling by the chosen rule."""
        if self.rule == "hessian":
            return GradientScaling(HessianDelta())
        delta = self.delta_weight if kind == "weight" else self.delta_activation
        return GradientScaling(FixedDelta((DELTA_FIXED if delta is None else delta) / (2**spec.bits - 1)))

    def default_levels(self, kind: TensorKind) -> Levels | Literal["auto"]:
        """The paper's symmetric grid for weights."""
        return "symmetric" if kind == "weight" else "auto"
