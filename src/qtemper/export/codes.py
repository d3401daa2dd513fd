"""What a device stores: integer weights with their scales, and the 8-bit integers of an activation's grid.

A weight is `codes * scale`, an activation `(codes - zero_point) * scale`. Grids whose levels are odd multiples of half
a bin (`symmetric`) have doubled codes, 2q + 1 at half the step, so that zero is a code of no level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtemper import layers
from qtemper.errors import ExportError
from qtemper.layers import QuantLayer, StoredWeight
from qtemper.modes import eval_mode
from qtemper.quantizer import Quantizer, quantizers

TOLERANCE = 1e-5
"""Relative difference, of the largest value, between a method's own levels and `codes * scale`: float32 rounding."""


@dataclass(frozen=True)
class Codes:
    """A grid of an activation on a device: real value `(code - zero_point) * scale`, codes in [low, high].

    Attributes:
        scale: bin size, a float32 number.
        zero_point: the code of 0.
        low: smallest code that occurs.
        high: largest code that occurs.
        signed: whether codes are int8, otherwise uint8.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    signed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Integer type that holds a code."""
        return torch.int8 if self.signed else torch.uint8


@dataclass(frozen=True)
class IntegerWeight:
    """A layer's weight: `codes * scale`.

    Attributes:
        codes: int16, shape of the weight.
        scale: float32, shape (output channels,).
        bits: of the grid that it comes from.
    """

    codes: Tensor
    scale: Tensor
    bits: int


def require_quantized(model: nn.Module) -> None:
    """Whether there is anything to export, and it is sound.

    Raises:
        ExportError: no quantized layers, or a tensor of the model that is not finite.
        NotCalibratedError: a quantizer has no scale yet.
    """
    if not any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ExportError("the model has no quantized layers; prepare, calibrate and train it first.")
    for _, quantizer in quantizers(model):
        quantizer.require_calibrated()
    for name, tensor in model.named_parameters():  # a buffer may be infinite: an attention's mask
        if tensor.requires_grad and not torch.isfinite(tensor).all():
            raise ExportError(f"{name} has NaN or infinite values; export a model that has not diverged.")


def sound_example(example: Tensor) -> Tensor:
    """The example on the CPU, without a gradient.

    Raises:
        ExportError: it has NaN or infinite values.
    """
    example = example.detach().cpu()
    if example.is_floating_point() and not torch.isfinite(example).all():
        raise ExportError("the example has NaN or infinite values; give real inputs.")
    return example


def float32(x: float) -> float:
    """The nearest float32 number."""
    return float(torch.tensor(x, dtype=torch.float32))


def integer_weight(name: str, layer: nn.Module) -> IntegerWeight:
    """The weight of a quantized layer as integers.

    Args:
        name: of the layer, for messages.
        layer: with a calibrated `weight_quantizer`.

    Raises:
        ExportError: the method's levels are no multiples of one step per output channel.
    """
    assert isinstance(layer, QuantLayer)
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, StoredWeight):
        scale = quantizer.scale.detach().cpu().reshape(-1)
        channels = quantizer.codes.shape[layers.weight_channel_axis(layer)]
        return IntegerWeight(quantizer.codes.cpu().to(torch.int16), scale.expand(channels).clone(), quantizer.bits)
    assert quantizer is not None
    quantizer.require_calibrated()
    axis = layers.weight_channel_axis(layer)
    latent = layer.latent_weight.detach()
    with torch.no_grad(), eval_mode(quantizer):
        x_hat = quantizer(latent).double()
        codes, doubled = _relative(quantizer.codes(latent), quantizer)
        scale = quantizer.grid.scale(latent).detach().double() / (2 if doubled else 1)
    rows = scale.expand(latent.shape).movedim(axis, 0).reshape(latent.shape[axis], -1)
    per_channel = rows[:, 0]
    shape = [1] * latent.dim()
    shape[axis] = -1
    error = (codes.double() * per_channel.reshape(shape) - x_hat).abs().max()
    if not (rows == per_channel[:, None]).all() or not error <= TOLERANCE * x_hat.abs().max().clamp_min(1e-30):
        raise ExportError(
            f"{name}.weight: its levels are no multiples of one step per output channel, which integer hardware needs; "
            "train the last epochs with a method on such a grid (lsq, tempering, ste, ewgs with grid_kind=step, ...)."
        )
    return IntegerWeight(codes.cpu(), per_channel.float().cpu(), quantizer.spec.bits)


def activation_codes(name: str, quantizer: Quantizer, *, signed: bool = False) -> Codes:
    """The integers of an activation quantizer's grid.

    Args:
        name: of the layer, for messages.
        quantizer: calibrated, one scale per tensor.
        signed: int8 codes with 0 for 0, instead of uint8 codes, which have 128 for 0 where values can be negative.

    Raises:
        ExportError: several scales, an offset, levels without zero, or codes that int8 cannot hold.
    """
    quantizer.require_calibrated()
    what = f"the input of {name}"
    if quantizer.spec.channel_axis is not None:
        raise ExportError(f"{what} has one scale per channel, which no integer convolution takes; use one per tensor.")
    qmin, qmax, zero_point = quantizer.grid.limits
    if zero_point != int(zero_point):
        raise ExportError(
            f"{what} is on a symmetric grid, which has no level at 0 for padding; use 'signed' levels for it, and 2 "
            "bits at least."
        )
    every = torch.arange(qmin, qmax + 1, dtype=torch.float32)
    with torch.no_grad():
        scale = float32(float(quantizer.grid.scale(every).reshape(-1)[0]))
        x_hat = quantizer.grid.decode(every, every, every).double()
    expected = (every.double() - zero_point) * scale
    if not (x_hat - expected).abs().max() <= TOLERANCE * expected.abs().max():  # NaN is refused, too
        raise ExportError(
            f"{what} has levels that are no multiples of its step (a learned offset), so that padding with 0 is not "
            "among them; train the last epochs with a method without one (lsq, tempering, ...)."
        )
    low, high = qmin - int(zero_point), qmax - int(zero_point)
    offset = 0 if signed or low >= 0 else 128
    codes = Codes(scale, offset, low + offset, high + offset, signed)
    if codes.high > torch.iinfo(codes.dtype).max:
        raise ExportError(f"{what} has codes up to {high}, which int8 cannot hold; use 7 bits, or signed levels.")
    return codes


def _relative(codes: Tensor, quantizer: Quantizer) -> tuple[Tensor, bool]:
    """Codes relative to zero, and whether they are doubled because zero lies between two."""
    zero_point = quantizer.grid.limits.zero_point
    doubled = zero_point != int(zero_point)
    relative = 2 * codes - int(2 * zero_point) if doubled else codes - int(zero_point)
    return relative.to(torch.int16), doubled
