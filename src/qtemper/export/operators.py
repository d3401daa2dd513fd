"""The operators of an integer model: exact in plain torch, and the ONNX subgraph of each is in `onnx.py`.

Codes are uint8 or int8. Accumulators are exact: sums of integers in a float type that holds every partial sum. What a
runtime does in float32 is done here in the same float32 operations, so the results are equal to the bit:
`round(sum * (bias_scale / scale))` with `bias_scale = x_scale * weight_scale`, each product and quotient rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_lib: Any = torch.library.Library("qtemper_integer", "DEF")  # type: ignore[no-untyped-call]
_GRID = "float scale, int zero_point, int low, int high"
_INPUT = "Tensor x, float x_scale, int x_zero_point"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor bias, Tensor bias_scale, int bits"
_lib.define(f"quantize(Tensor x, {_GRID}, bool signed) -> Tensor")
_lib.define(f"dequantize({_INPUT}) -> Tensor")
_lib.define("dequantize_weight(Tensor weight, Tensor weight_scale, int axis) -> Tensor")
_lib.define(
    f"convolve({_INPUT}, {_WEIGHT}, int[] stride, int[] padding, int[] dilation, int groups, {_GRID}) -> Tensor"
)
_lib.define(f"linear({_INPUT}, {_WEIGHT}, {_GRID}) -> Tensor")
_lib.define(f"linear_real({_INPUT}, {_WEIGHT}) -> Tensor")
_lib.define(f"add_codes({_INPUT}, Tensor y, float y_scale, int y_zero_point, {_GRID}) -> Tensor")
_lib.define(f"average({_INPUT}, {_GRID}) -> Tensor")
_lib.define("max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor")
_lib.define("clamp_codes(Tensor x, int low, int high) -> Tensor")
_lib.define("quant(Tensor x, Tensor scale, float zero_point, int bits, bool signed) -> Tensor")

ops = torch.ops.qtemper_integer

KERNELS = (ops.convolve.default, ops.linear.default, ops.linear_real.default)
"""The operators with weights; their arguments begin with the input's codes, scale and zero point, and the weight."""


def _clamp_round(real: Tensor, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(real) + zero_point).clamp(low, high).to(dtype)


def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    """`clamp(round(x / scale) + zero_point, low, high)`; ties to even."""
    step = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _clamp_round(x.float() / step, zero_point, low, high, torch.int8 if signed else torch.uint8)


def dequantize(x: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
    """`(x - zero_point) * scale`, float32."""
    return (x.float() - x_zero_point) * torch.tensor(x_scale, dtype=torch.float32, device=x.device)


def dequantize_weight(weight: Tensor, weight_scale: Tensor, axis: int) -> Tensor:
    """A float weight from its codes, for a layer whose input is in float."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight.float() * weight_scale.reshape(shape)


def _requantize(accumulator: Tensor, unit: Tensor, scale: float, axis: int) -> Tensor:
    """Sums, in units of `unit`, to positions on the next grid: one float32 product."""
    factor = unit / torch.tensor(scale, dtype=torch.float32, device=unit.device)
    shape = [1] * accumulator.dim()
    shape[axis] = -1
    return accumulator.float() * factor.reshape(shape)


def _exact_type(weight: Tensor, bits: int) -> torch.dtype:
    """A float type in which every partial sum of codes is an integer that it holds."""
    # Doubled codes have a bit more; oneDNN's float32 convolutions are plain sums of products, no Winograd transforms.
    largest = 255 * 2**bits * weight[0].numel()
    return torch.float32 if largest < 2**24 else torch.float64


def convolve(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    bias_scale: Tensor,
    bits: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
) -> Tensor:
    """Convolution of codes plus an int32 bias of scale `bias_scale`, per output channel, onto the next grid."""
    kind, none = _exact_type(weight, bits), [0] * len(padding)
    operands = x.to(kind) - x_zero_point, weight.to(kind)
    total = torch.ops.aten.convolution(*operands, None, stride, padding, dilation, False, none, groups)
    total = total.double() + bias.double().reshape(-1, *[1] * len(padding))
    real = _requantize(total, bias_scale, scale, axis=1)
    return _clamp_round(real, zero_point, low, high, x.dtype)


def _accumulate(x: Tensor, x_zero_point: int, weight: Tensor, bias: Tensor, bits: int) -> Tensor:
    kind = _exact_type(weight, bits)
    return torch.nn.functional.linear(x.to(kind) - x_zero_point, weight.to(kind)).double() + bias.double()


def linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    bias_scale: Tensor,
    bits: int,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
) -> Tensor:
    """The same for a linear layer."""
    real = _requantize(_accumulate(x, x_zero_point, weight, bias, bits), bias_scale, scale, axis=-1)
    return _clamp_round(real, zero_point, low, high, x.dtype)


def linear_real(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    bias_scale: Tensor,
    bits: int,
) -> Tensor:
    """A linear layer whose exact sums leave the integers: float32 `sum * bias_scale`."""
    return _accumulate(x, x_zero_point, weight, bias, bits).float() * bias_scale


def add_codes(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
) -> Tensor:
    """Sum of two tensors whose scales are the sum's times powers of two, so that nothing but the end is rounded."""
    real = (x.double() - x_zero_point) * (x_scale / scale) + (y.double() - y_zero_point) * (y_scale / scale)
    return _clamp_round(real, zero_point, low, high, x.dtype)


def average(x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """Mean over each image, shape (N, C, H, W) to (N, C, 1, 1)."""
    pixels = x.shape[-1] * x.shape[-2]
    total = (x.double() - x_zero_point).sum((-2, -1), keepdim=True)
    one = torch.tensor(x_scale, dtype=torch.float32, device=x.device)
    step = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _clamp_round(total.float() * (one / (step * pixels)), zero_point, low, high, x.dtype)


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Largest code of each window; padding never wins."""
    # Integers of 8 bits are exact in float32, and torch has no max pooling of them.
    return torch.nn.functional.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode).to(x.dtype)


def clamp_codes(x: Tensor, low: int, high: int) -> Tensor:
    """Codes kept in a range: a ReLU where both neighbours have the same grid."""
    return x.clamp(low, high)


def quant(x: Tensor, scale: Tensor, zero_point: float, bits: int, signed: bool) -> Tensor:
    """QONNX's fake quantization."""
    low = -(2 ** (bits - 1)) if signed else 0
    return (torch.round(x / scale + zero_point).clamp(low, low + 2**bits - 1) - zero_point) * scale


# Shapes and types alone, for torch.export, which would otherwise trace every operation inside.


def _same_shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _same_shape_real(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def _quantize_shape(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


def _convolve_shape(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    bias_scale: Tensor, bits: int, stride: list[int], padding: list[int], dilation: list[int], *_: object,
) -> Tensor:  # fmt: skip
    numbers = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in numbers]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


def _linear_shape(x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_real_shape(x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _add_shape(x: Tensor, x_scale: float, x_zero_point: int, y: Tensor, *_: object) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    return x.new_empty(shape)


def _average_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-2], 1, 1))


def _max_pool_shape(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    size = torch.nn.functional.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode).shape
    return x.new_empty(size)


for _function, _shape in (
    (quantize, _quantize_shape),
    (dequantize, _same_shape_real),
    (dequantize_weight, _same_shape_real),
    (convolve, _convolve_shape),
    (linear, _linear_shape),
    (linear_real, _linear_real_shape),
    (add_codes, _add_shape),
    (average, _average_shape),
    (max_pool, _max_pool_shape),
    (clamp_codes, _same_shape),
    (quant, _same_shape),
):
    _lib.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtemper_integer::{_function.__name__}", _shape, lib=_lib)
