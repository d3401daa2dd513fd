"""Quant-Noise: a random subset of the elements is quantized in each step.

Fan, Stock, Graham, Grave, Gribonval, Jegou and Joulin, "Training with Quantization Noise for Extreme Model
Compression", ICLR 2021, arXiv 2004.07320; its scalar variant.

    training   x_hat = s * (v' - z),    v' = round(v) where m = 1,  v where m = 0,    m ~ Bernoulli(p) per element
    eval       x_hat = s * (round(v) - z),    v = clamp(x / s + z, qmin, qmax)
    backward   dL/dx = g inside the range, 0 outside
               dL/ds = c * sum g * (v' - v) inside,  g * (qmin or qmax - z) where clipped;  c as in LSQ

p = 1 is LSQ to the bit.

Learned: `s`, by LSQ's gradient, to which elements that are not quantized add nothing.

Our reading:
- The paper learns nothing and takes its scale anew from the weights every 1,000 steps; a learned step, as in the
  other methods here, leaves exactly one difference to `lsq`.
- Elements that are not quantized are clipped all the same, as in the authors' code (fairseq).
- `noise_on` says which tensors are quantized in part. The others are quantized as a whole.
- p = 0.5; fairseq's default is 0.2, from networks of 4 and 8 bits.
- Its variant for product quantization (blocks set to zero) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qtemper import functional as F
from qtemper.counter import NoiseSource
from qtemper.methods.lsq import LearnedStep
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind


@final
class PartialRounding(Rounding):
    """Forward `round(v)` with a probability, else `v`; backward `g`."""

    reach = 0
    probability: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        # A hyperparameter, not state: a checkpoint does not change it.
        self.register_buffer("probability", torch.tensor(probability), persistent=False)
        self.noise = NoiseSource()

    def forward(self, v: Tensor) -> Tensor:
        """Round a random subset, straight through."""
        fixed = v.detach()
        chosen = self.noise(v) < self.probability.to(torch.float32)
        return F.replace_value(v, torch.where(chosen, torch.round(fixed), fixed))

    def set_progress(self, progress: float) -> None:
        """A fresh subset."""
        self.noise.set_progress(progress)


@final
@dataclass(frozen=True)
class QuantNoise(Method):
    """Learned step, a random subset of the elements quantized in each step.

    Attributes:
        probability: share of the elements that are quantized, in (0, 1].
        noise_on: `weights`, `activations` or `both`; tensors of the other kind are quantized as a whole.
    """

    name: ClassVar[str] = "quant_noise"
    probability: float = 0.5
    noise_on: Literal["both", "weights", "activations"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {self.probability}.")

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """A random subset, or straight through."""
        if self.noise_on in ("both", "weights" if kind == "weight" else "activations"):
            return PartialRounding(self.probability)
        return StraightThrough()
