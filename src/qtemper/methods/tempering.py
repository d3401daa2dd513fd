"""Noise tempering: error-aware noise that decays exponentially, and a learnable scale of the task-loss gradient.

Wang, Li, Qu, Metze and Strubell, "Error-aware Quantization through Noise Tempering", arXiv 2212.05603, 2022.

Stated by the abstract: noise aware of the quantization error, decaying exponentially, and a learnable scale on the
task-loss gradient, per quantizer; the noise holds a curvature term that draws training to flatter minima.
Our reading, everything below (no text beyond the abstract, and no code, was available). The scale may be something
else: the abstract's words, of each layer's bin size, also fit LSQ's learned step by itself, which is `scale_on="none"`.

    training   x_hat = s * (q - z + T * zeta * e),    q = round(v),  e = v - q,  fresh zero-mean zeta each step
    eval       x_hat = s * (q - z)
    T          T0 * exp(-kappa * progress), exactly 0 once below T_min
    backward   dL/dx = g * max(0, 1 + delta * sign(g) * (v - v')) inside the range, 0 outside;  v' = q + T * zeta * e
               dL/ds = c * sum g * (v' - v) inside,  g * (qmin or qmax - z) where clipped;  c as in LSQ

The noise is zero on grid points and in the clipped region, largest at bin edges, and measured in bins. In
expectation `L(x_hat)` gains `T^2 / 2 * Var(zeta) * sum e^2 s^2 H_ii`: the curvature term.
Identities: T = 0 and delta = 0 is LSQ; T = 0 and delta > 0 is EWGS on the same grid (its own has symmetric weights) and
with its delta in bins; both to the bit (tests/test_methods.py).

Noise (`noise`): `uniform` U(-sqrt3, sqrt3), `rademacher` +-1, `gaussian`, all of unit variance; `toward_input`
zeta ~ U(0, 1), v' between q and v; `on_grid` v' = q + sign(e) with probability T |e|, integers throughout (at T = 1
unbiased stochastic rounding; its variance |e| (1 - |e|) is the curvature term of LOTION, arXiv 2510.08757).

Rules for delta (`delta_rule`), how it is learned being unpublished:
- `fixed`: a constant.
- `hessian`: EWGS's formula every few epochs.
- `gradient`: a parameter that also scales the noise, T * delta * zeta * e, and is trained by the task loss through it.
- `correlation` (ours): `sum(g * eta) / sum(eta^2)` with eta = T * zeta * e estimates the mean Hessian diagonal,
  weighted by e^2, at no extra pass; a running average of it goes into EWGS's formula.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.counter import NoiseSource, fill, set_keys
from qtemper.methods.ewgs import DELTA_MAX, Delta, FixedDelta, HessianDelta
from qtemper.methods.lsq import LearnedStep
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind
from qtemper.schedules import Exponential, Schedule

NoiseName = Literal["none", "uniform", "rademacher", "gaussian", "toward_input", "on_grid"]
RuleName = Literal["fixed", "hessian", "gradient", "correlation"]

ZETA: dict[str, Callable[[NoiseSource, Tensor, Tensor], Tensor]] = {
    "uniform": lambda noise, v, t: noise.signed(v, t * math.sqrt(3.0)).to(v.dtype),
    "rademacher": lambda noise, v, t: t * torch.where(noise(v) < 0.5, -1.0, 1.0).to(v.dtype),
    "gaussian": lambda noise, v, t: t * noise.gaussian(v).to(v.dtype),
    "toward_input": lambda noise, v, t: t * noise(v).to(v.dtype),
}
"""Multiplier T * zeta of the error, from noise, positions and T. `on_grid` jumps instead of multiplying."""

REACH = {
    "none": 0.0,
    "uniform": math.sqrt(3.0),
    "rademacher": 1.0,
    "gaussian": 5.2,
    "toward_input": 0.0,
    "on_grid": 0.0,
}
"""Largest multiplier of an error, which is at most half a bin."""

ZERO_MEAN = ("uniform", "rademacher", "gaussian")


@final
class GradientDelta(Delta):
    """Delta as a parameter, trained by the task loss because it also scales the noise; kept in [floor, 2)."""

    def __init__(self, value: float, floor: float = 1e-3) -> None:
        super().__init__()
        self.floor = floor
        self.value = nn.Parameter(torch.tensor([max(value, floor)]))

    def gain(self) -> Tensor:
        """Delta, shape (), with its gradient."""
        return F.replace_value(self.value, self.value.detach().clamp(self.floor, DELTA_MAX)).reshape(())

    def forward(self) -> Tensor:
        """Delta without its gradient."""
        return self.gain().detach()

    def advance(self) -> None:
        """Bring the parameter back into its range after an optimizer step."""
        self.value.detach().clamp_(self.floor, DELTA_MAX)


@final
class CorrelationDelta(Delta):
    """EWGS's formula fed by what the injected noise reveals of the curvature (`elementwise_gradient_scaling`).

    The estimate of delta has the standard error `sqrt((1 - m) / (1 + m)) / (3 * sqrt(sum eta^2))`, m the momentum,
    which grows as the noise fades. Delta is the estimate less two of them, or 0: what is not significant does
    nothing (in the first steps two are fewer: 1.4). Once the noise is off, delta stays as it was last.

    std(g) is that of the gradients as they arrive. Where a weight's comes in parts (processes, micro-batches, a layer
    used twice) the parts spread more than their mean, so delta is smaller than in one process.

    Args:
        value: delta until the first estimate.
        momentum: weight of the past in the running averages, per optimizer step.
    """

    value: Tensor
    averages: Tensor
    sums: Tensor

    def __init__(self, value: float = 0.0, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.tensor(value))
        # sum g*eta, sum eta^2, sum g, sum g^2, count: of the step under way, and averaged with the same weights.
        self.register_buffer("sums", torch.zeros(5))
        self.register_buffer("averages", torch.zeros(5))

    def forward(self) -> Tensor:
        """The current estimate's delta."""
        return self.value

    @staticmethod
    def advance_together(rules: Sequence[CorrelationDelta]) -> None:
        """Take the statistics of the last backward pass: all rules of one momentum and device."""
        # Tensors only: reading a number here would synchronise a GPU.
        momentum = rules[0].momentum
        sums, before = torch.stack([r.sums for r in rules]), torch.stack([r.averages for r in rules])
        usable = torch.isfinite(sums).all(dim=1) & (sums[:, 1] > 0)
        averages = torch.where(usable[:, None], momentum * before + (1 - momentum) * sums, before)
        correlation, noise, mean, square, count = averages.unbind(dim=1)
        std = (square / count - (mean / count) ** 2).clamp_min(0).sqrt()
        error = math.sqrt((1 - momentum) / (1 + momentum)) / (3 * noise.sqrt())
        delta = (correlation / noise / (3 * std) - 2 * error).clamp(0, DELTA_MAX)
        delta = torch.where(usable & torch.isfinite(delta), delta, torch.stack([r.value for r in rules]))
        torch._foreach_copy_([r.averages for r in rules], list(averages))
        torch._foreach_copy_([r.value for r in rules], list(delta))
        torch._foreach_zero_([r.sums for r in rules])


@final
class TemperedRounding(Rounding):
    """Error-aware noise at a temperature, with element-wise gradient scaling.

    Args:
        noise: variant, or `none`.
        temperature: schedule of T over training progress.
        delta: rule for the gradient scaling.
        hard_forward: noise in the gradient only.
    """

    temperature: Tensor

    def __init__(self, noise: NoiseName, temperature: Schedule, delta: Delta, *, hard_forward: bool = False) -> None:
        super().__init__()
        self.variant = noise
        self.schedule = temperature
        self.delta = delta
        self.hard_forward = hard_forward
        self.wants_curvature = delta.wants_curvature
        # A gradient scale that is 0 for good needs no arithmetic; the result is the same to the bit.
        self.scales_gradient = not (isinstance(delta, FixedDelta) and float(delta.value) == 0.0)
        self.noise = NoiseSource() if noise != "none" else None
        self.integral = noise in ("none", "on_grid")
        gain = DELTA_MAX if isinstance(delta, GradientDelta) else 1.0  # it scales the noise, too
        strength = gain * max(abs(temperature(i / 256)) for i in range(257)) / 2  # largest noise on a bin's edge
        self.reach = math.ceil(max(0.0, strength - 1) if noise == "toward_input" else REACH.get(noise, 0.0) * strength)
        self.register_buffer("temperature", torch.tensor(temperature(0.0) if noise != "none" else 0.0))

    def forward(self, v: Tensor) -> Tensor:
        """Surrogate of `round(v)`."""
        q = torch.round(v)
        value = q
        multiplier = None
        if self.noise is not None:
            if self.variant == "on_grid":
                value = q + _jump(v - q, self.noise(v).to(v.dtype), self.temperature)
            else:
                multiplier = ZETA[self.variant](self.noise, v, self.temperature.to(v.dtype))
                if isinstance(self.delta, GradientDelta):
                    multiplier = multiplier * self.delta.gain()
                value = q + multiplier * (v - q)
        if self.scales_gradient:
            sums = self.delta.sums if isinstance(self.delta, CorrelationDelta) and self.noise is not None else None
            out = F.elementwise_gradient_scaling(v, value, self.delta().to(v.dtype), sums)
        else:
            out = F.replace_value(v, value)
        if isinstance(self.delta, GradientDelta) and multiplier is not None:
            noise = multiplier * (v - q).detach()
            return out + (noise - noise.detach())
        return out

    def set_progress(self, progress: float) -> None:
        """Set the temperature, draw fresh noise, take the last step's curvature statistics."""
        self.set_progress_together([self], progress)

    @classmethod
    def set_progress_together(cls, roundings: Sequence[TemperedRounding], progress: float) -> None:
        """See `Rounding`."""
        rules: dict[object, list[CorrelationDelta]] = {}
        for rounding in roundings:
            if isinstance(rounding.delta, GradientDelta):
                rounding.delta.advance()
            elif isinstance(rounding.delta, CorrelationDelta):
                rules.setdefault((rounding.delta.momentum, rounding.delta.sums.device), []).append(rounding.delta)
        for alike in rules.values():
            CorrelationDelta.advance_together(alike)
        noisy = [r for r in dict.fromkeys(roundings) if r.noise is not None]
        fill([r.temperature for r in noisy], [r.schedule(progress) for r in noisy])
        set_keys([r.noise for r in noisy if r.noise is not None], progress)

    def statistics(self) -> list[Tensor]:
        """The curvature sums, where there are any."""
        return [self.delta.sums] if isinstance(self.delta, CorrelationDelta) else []

    def set_curvature(self, mean_diagonal: float, gradient_std: float) -> None:
        """Pass the estimate to the rule."""
        self.delta.set_curvature(mean_diagonal, gradient_std)


def _jump(e: Tensor, u: Tensor, temperature: Tensor) -> Tensor:
    """To the neighbouring code on v's side with probability T * |e|, on either side; T beyond 2 counts as 2."""
    return torch.floor(temperature.to(e.dtype).clamp(0.0, 2.0 - 2.0**-22) * e + u)


@final
@dataclass(frozen=True)
class NoiseTempering(Method):
    """Noise tempering; every part can be switched off, so that an ablation is one recipe with one field changed.

    Attributes:
        noise: `uniform`, `rademacher`, `gaussian`, `toward_input`, `on_grid`, or `none`.
        noise_on: `both`, `weights` or `activations`.
        noise_in: `forward` (and so in the gradient), or `gradient`: the forward pass stays the hard quantizer. With
            delta off only the gradient of the step then differs from LSQ's.
        temperature: schedule of T over training progress.
        delta_rule: `fixed`, `hessian`, `gradient` or `correlation`, the default: ours, and on weights alone, where the
            abstract names activations, too.
        delta_weight: delta of the weights in 1 / bins: the constant of `fixed`, the first value of the others; None is
            1 for `gradient`, where it is also the amplitude of the noise, and 0 for the others.
        delta_activation: likewise for the activations.
        scale_on: the tensors whose gradient is scaled at all: `both`, `weights`, `activations` or `none`.
    """

    name: ClassVar[str] = "tempering"
    noise: NoiseName = "uniform"
    noise_on: Literal["both", "weights", "activations"] = "both"
    noise_in: Literal["forward", "gradient"] = "forward"
    temperature: Schedule = Exponential(start=1.0, end=math.exp(-5.0), cutoff=1e-2)
    delta_rule: RuleName = "correlation"
    delta_weight: float | None = None
    delta_activation: float | None = None
    scale_on: Literal["both", "weights", "activations", "none"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_on != "none":
            if self.delta_rule == "correlation" and self.noise not in ZERO_MEAN:
                raise ValueError(
                    f"delta_rule='correlation' reads the curvature off zero-mean noise; noise={self.noise!r} has "
                    f"none. Use noise in {ZERO_MEAN}, or delta_rule='hessian' or 'fixed', or scale_on='none'."
                )
            if self.delta_rule == "gradient" and self.noise in ("none", "on_grid"):
                raise ValueError(
                    f"delta_rule='gradient' trains delta through the noise it scales; noise={self.noise!r} has "
                    "nothing to scale. Use another noise, or delta_rule='hessian' or 'fixed', or scale_on='none'."
                )
            if self.delta_rule in ("correlation", "gradient") and self.noise_in == "gradient":
                raise ValueError(
                    f"delta_rule={self.delta_rule!r} learns from noise that the loss sees; with noise_in='gradient' it "
                    "sees none. Use noise_in='forward', or delta_rule='hessian' or 'fixed', or scale_on='none'."
                )
            constants = {"weights": self.delta_weight, "activations": self.delta_activation}
            used = [value for which, value in constants.items() if self.scale_on in ("both", which)]
            if self.delta_rule == "fixed" and used == [None] * len(used):
                fields = {"weights": "delta_weight", "activations": "delta_activation"}
                wanted = fields.get(self.scale_on, "delta_weight or delta_activation")
                raise ValueError(
                    f"delta_rule='fixed' has no constant for scale_on={self.scale_on!r}: set {wanted}, or scale_on to "
                    "what is to be scaled."
                )
            self._warn_if_nothing_learns()
        for field in ("delta_weight", "delta_activation"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 2:
                raise ValueError(f"{field} must be in [0, 2) in units of 1 / bins, got {value}.")
        if self.noise == "none" and (self.noise_in == "gradient" or self.noise_on != "both"):
            warnings.warn("noise='none': noise_on and noise_in have no effect.", stacklevel=3)

    def _warn_if_nothing_learns(self) -> None:
        noisy = {"weights", "activations"} if self.noise_on == "both" else {self.noise_on}
        scaled = {"weights", "activations"} if self.scale_on == "both" else {self.scale_on}
        if self.delta_rule in ("correlation", "gradient") and not noisy & scaled:
            warnings.warn(
                f"delta_rule={self.delta_rule!r} needs noise on the tensors it scales; with noise_on={self.noise_on!r} "
                f"and scale_on={self.scale_on!r} delta stays constant.",
                stacklevel=4,
            )

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Tempered noise and gradient scaling for this kind of tensor."""
        which = "weights" if kind == "weight" else "activations"
        noise: NoiseName = self.noise if self.noise_on in ("both", which) else "none"
        return TemperedRounding(
            noise,
            self.temperature,
            self._delta(kind, noise, scaled=self.scale_on in ("both", which)),
            hard_forward=self.noise_in == "gradient",
        )

    def _delta(self, kind: TensorKind, noise: NoiseName, *, scaled: bool) -> Delta:
        if not scaled:
            return FixedDelta(0.0)
        given = self.delta_weight if kind == "weight" else self.delta_activation
        value = given if given is not None else float(self.delta_rule == "gradient" and noise != "none")
        if self.delta_rule == "hessian":
            return HessianDelta(value)
        if self.delta_rule == "fixed" or noise == "none":  # the other two learn from this tensor's noise
            return FixedDelta(value)
        return GradientDelta(value) if self.delta_rule == "gradient" else CorrelationDelta(value)
