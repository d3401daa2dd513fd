"""Batch norm into the scales and the bias of an integer layer; its weights' codes stay what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtemper.errors import ExportError
from qtemper.export.codes import Codes, IntegerWeight
from qtemper.fast.integer import ACCUMULATOR_MAX

NEGLIGIBLE = 1e-3
"""Of its bias: what a channel may lose whose weights batch norm makes too small for an int32 bias beside them."""


@dataclass(frozen=True)
class Folded:
    """Constants of an integer layer.

    Attributes:
        codes: int8, shape of the weight.
        scale: float32, shape (output channels,).
        bias: int32, shape (output channels,), in units of `bias_scale`.
        bias_scale: float32, shape (output channels,): input's scale times `scale`.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor


def check_int8(name: str, codes: Tensor) -> None:
    """Whether codes fit int8.

    Raises:
        ExportError: they do not.
    """
    if codes.min() < -128 or codes.max() > 127:
        raise ExportError(
            f"{name}.weight has 8-bit codes on a symmetric grid, which needs 9 bits in integers; train it with "
            f"Rule({name!r}, weight_levels='signed'), or with 7 bits."
        )


def fold(name: str, weight: IntegerWeight, bias: Tensor | None, norms: list[list[Any]], x: Codes) -> Folded:
    """Fold a layer's bias and batch norms.

    Args:
        name: of the layer, for messages.
        weight: its integers, output channels first.
        bias: float, or None.
        norms: `[gamma, beta, mean, variance, eps]` of each batch norm behind it, in order.
        x: grid of the input.

    Raises:
        ExportError: codes that int8 cannot hold, sums that int32 cannot hold, numbers that are not finite.
    """
    channels = weight.codes.shape[0]
    gain = torch.ones(channels, dtype=torch.float64)
    offset = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
    for gamma, beta, mean, variance, eps in norms:
        factor = (variance.detach().cpu().double() + eps).rsqrt()
        factor = factor if gamma is None else factor * gamma.detach().cpu().double()
        gain, offset = gain * factor, factor * (offset - mean.detach().cpu().double())
        offset = offset if beta is None else offset + beta.detach().cpu().double()
    if not (torch.isfinite(gain).all() and torch.isfinite(offset).all()):
        raise ExportError(f"{name}: its bias or the batch norm behind it is not finite; the training diverged.")
    scale = weight.scale.double() * gain
    codes = weight.codes.to(torch.int32)
    # Runtimes want positive scales: a channel turns its sign, unless it has a -128, whose opposite int8 does not have.
    rows = codes.reshape(channels, -1)
    turned = (scale < 0) & (rows.amin(1) > -128)
    codes = torch.where(turned.reshape(-1, *[1] * (codes.dim() - 1)), -codes, codes)
    scale = torch.where(turned, -scale, scale).float()
    largest = codes.reshape(channels, -1).abs().sum(1).double() * max(x.high - x.zero_point, x.zero_point - x.low)
    room = ACCUMULATOR_MAX - largest
    if (room < 0).any():
        raise ExportError(f"{name}: its sums do not fit int32; use fewer bits.")
    unit = x.scale * scale.double()
    dead = offset.abs() >= unit.abs() * room
    if (dead & (unit.abs() * largest > NEGLIGIBLE * offset.abs())).any():
        raise ExportError(f"{name}: batch norm leaves a channel whose bias does not fit int32 beside its sums.")
    codes[dead] = 0
    resting = torch.where(offset == 0, 1.0, offset.abs() / (x.scale * 2.0**30))
    scale = torch.where(dead, resting.float(), scale)
    bias_scale = torch.tensor(x.scale, dtype=torch.float32) * scale
    integer_bias = torch.round(offset / bias_scale.double()).to(torch.int32)
    check_int8(name, codes)
    return Folded(codes.to(torch.int8), scale, integer_bias, bias_scale)
