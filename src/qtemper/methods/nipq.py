"""NIPQ at fixed bits: noise drawn from the histogram of the tensor's own quantization error.

Shin, So, Park, Kang, Yoo and Park, "NIPQ: Noise Proxy-Based Integrated Pseudo-Quantization", CVPR 2023,
arXiv 2206.00820.

    training   x_hat = s * (v + n - z) inside the range,  s * (qmin or qmax - z) on its bounds and beyond
    eval       x_hat = s * (round(v) - z),    v = clamp(x / s + z, qmin, qmax)
    n          drawn, for each element, from the histogram of e = round(v) - v of the elements inside: 256 bins over
               [-1/2, 1/2], inverse CDF of a uniform number, centre of the bin found
    backward   dL/dx = g inside the range, 0 outside
               dL/ds = c * sum g * n inside,  g * (qmin or qmax - z) where clipped;  c as in LSQ

So the noise knows how errors are distributed, and not the element's own error, as noise tempering's does.

Learned: `s`, by LSQ's gradient, which for activations is what the paper's own parametrisation (a clip
alpha = softplus(a), with s = alpha / levels) gives but for the softplus and LSQ's constant c. The paper's weights have
a level less, -alpha to alpha; here they have all 2^b.

Our reading:
- Bits are fixed; the paper's learned bit widths are left out (its code has them fixed as an option).
- Positions are clamped, so an element on a bound cannot be told from a clipped one. Inside is whatever is on no code:
  clipped elements are on one, and so are a ReLU's zeros, which stay zero and do not count.
- A histogram is of one sample for activations, of the whole tensor for weights: the noise of a sample depends neither
  on its batch nor on the number of processes nor on the fast path's blocks.
- The paper ends with epochs of real rounding at frozen bits; here that is a second run with `lsq`.
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


def sample_errors(v: Tensor, u: Tensor, inside: Tensor) -> Tensor:
    """Numbers with the distribution of `round(v) - v`: the centre of the bin that `u` falls into.

    Args:
        v: positions, shape (rows, n); each row has its own histogram.
        u: uniform numbers in (0, 1), shape of `v`, float32.
        inside: which positions count, shape of `v`, bool.
    """
    rows = v.shape[0]
    bins = torch.floor((torch.round(v) - v + 0.5) * 256).clamp(0, 255).to(torch.int64)
    # One dimension: the sum of ones is exact in any order up to 2**24, so the result is the same every time.
    index = bins + 256 * torch.arange(rows, device=v.device)[:, None]
    counts = torch.zeros(rows * 256, device=v.device, dtype=torch.float32)
    counts = counts.scatter_add(0, index.reshape(-1), inside.reshape(-1).to(torch.float32))
    cumulative = counts.reshape(rows, 256).cumsum(1)
    # The bin of each rank, counted up where a bin ends: what a search of each element's would find, in a sixth of the
    # time. An empty row has none, and nothing inside that could use it.
    ends = torch.zeros(rows, v.shape[1] + 1, device=v.device, dtype=torch.float32)
    ends = ends.scatter_add(1, cumulative.to(torch.int64).clamp(max=v.shape[1]), torch.ones_like(cumulative))
    rank = torch.floor(u * cumulative[:, -1:]).to(torch.int64).clamp(max=v.shape[1])
    found = ends.cumsum(1).gather(1, rank).clamp(max=255)
    return (found.to(v.dtype) + 0.5) / 256 - 0.5


@final
class HistogramNoise(Rounding):
    """Forward `v` plus an error drawn from the histogram where `v` is no code; backward `g`.

    Args:
        batched: whether dimension 0 is the batch; then each sample has a histogram of its own.
    """

    reach = 1

    def __init__(self, *, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.noise = NoiseSource()

    def forward(self, v: Tensor) -> Tensor:
        """Add noise."""
        fixed = v.detach()
        rows, u = self._rows(fixed), self._rows(self.noise(fixed))
        inside = rows != torch.round(rows)
        drawn = torch.where(inside, sample_errors(rows, u, inside), 0.0).reshape(fixed.shape)
        return F.replace_value(v, fixed + drawn)

    def _rows(self, v: Tensor) -> Tensor:
        """One row for each histogram."""
        if not self.batched or v.dim() == 0:
            return v.reshape(1, -1)
        return v.flatten(1) if v.dim() > 1 else v[:, None]

    def set_progress(self, progress: float) -> None:
        """Fresh noise."""
        self.noise.set_progress(progress)


@final
@dataclass(frozen=True)
class NIPQ(Method):
    """Learned step, noise with the distribution of the true error, for weights and activations."""

    name: ClassVar[str] = "nipq"

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The learned step."""
        return LearnedStep(spec, num_channels, batched=kind == "activation")

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Noise from the histogram."""
        return HistogramNoise(batched=kind == "activation")
