"""Textbook LSQ: the paper's pseudo-code as plain autograd, which is what most public code does.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, algorithm 1. Written from the paper; the
baseline for what a straightforward implementation costs.
"""

from __future__ import annotations

import math

import torch
from benchmarks.training_step.layers import QuantizedLayer, inputs, replace, sites
from benchmarks.training_step.setup import Setup
from torch import Tensor, nn


def grad_scale(x: Tensor, scale: float) -> Tensor:
    """`x`, whose gradient is multiplied by `scale`."""
    scaled = x * scale
    return (x - scaled).detach() + scaled


def round_pass(x: Tensor) -> Tensor:
    """`round(x)`, with the gradient of `x`."""
    return (x.round() - x).detach() + x


class LearnedStepQuantizer(nn.Module):
    """`s * round(clip(x / s, -Q_N, Q_P))` with a learned step `s`, one for the tensor."""

    def __init__(self, codes: tuple[int, int], sample: Tensor, *, batched: bool) -> None:
        super().__init__()
        self.lowest, self.highest = codes
        self.batched = batched
        self.step = nn.Parameter(2 * sample.detach().abs().mean() / math.sqrt(max(self.highest, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize."""
        count = x.numel() // (x.shape[0] if self.batched else 1)
        step = grad_scale(self.step, 1 / math.sqrt(count * max(self.highest, 1)))
        return round_pass(torch.clamp(x / step, self.lowest, self.highest)) * step


def quantize(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """Put a quantizer on weight and input of every convolution and linear layer."""
    seen = dict(inputs(model, images))
    for site in sites(model, setup, images):
        weight = LearnedStepQuantizer(site.weight_codes(), site.layer.weight, batched=False)
        activation = LearnedStepQuantizer(site.input_codes(), seen[site.name], batched=True)
        replace(model, site.name, QuantizedLayer(site.layer, weight, activation))
    return model
