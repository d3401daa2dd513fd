"""Convolution of integer codes, exact: int32 accumulators on the CPU's 8-bit units.

oneDNN multiplies uint8 by int8. Without VNNI or AMX it adds two products in 16 bits and saturates, silently, so
`is_exact` tries the extreme codes of a pair of ranges on a layer's shape before the pair is used.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtemper.leaf import define

ACCUMULATOR_MAX = 2**31 - 1


class Geometry(NamedTuple):
    """Stride, padding, dilation (each for height and width) and groups of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def numbers(self) -> list[int]:
        """All of them in a row."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of(cls, numbers: list[int]) -> Geometry:
        """That of `numbers()`."""
        (a, b), (c, d), (e, f), groups = numbers[:2], numbers[2:4], numbers[4:6], numbers[6]
        return cls((a, b), (c, d), (e, f), groups)


POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)


def _convolve(x: Tensor, w: Tensor, scale: Tensor, zero_point: int, numbers: list[int], dtype: torch.dtype) -> Tensor:
    stride, padding, dilation, groups = numbers[:2], numbers[2:4], numbers[4:6], numbers[6]
    zeros = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
    op = torch.ops.onednn
    tail: tuple[object, ...] = (stride, padding, dilation, groups, 1.0, 0, dtype, "none", [], "")

    def convolve(packed_for: int) -> Tensor:
        packed = op.qconv_prepack(w, scale, 1.0, packed_for, stride, padding, dilation, groups, list(x.shape))
        result: Tensor = op.qconv2d_pointwise(x, 1.0, zero_point, packed, scale, zeros, None, *tail)
        return result

    # Packed as for 0, whatever the zero point: for another one oneDNN takes four times as long, and the convolution
    # itself adds to weights packed for 0 what it needs.
    try:
        return convolve(0)
    except RuntimeError:  # where oneDNN has no kernel that adds it
        if not zero_point:
            raise
        return convolve(zero_point)


# An operator, for compilers. Not by `torch.library.custom_op`, whose wrappers take 25 us a call.
_convolve_codes = define(
    "convolve_codes(Tensor x, Tensor w, Tensor scale, int zero_point, int[] geometry, ScalarType dtype) -> Tensor",
    _convolve,
    "CPU",
)


@torch.library.register_fake("qtemper::convolve_codes")  # type: ignore[untyped-decorator]
def _(x: Tensor, w: Tensor, scale: Tensor, zero_point: int, numbers: list[int], dtype: torch.dtype) -> Tensor:
    stride, padding, dilation, _ = Geometry.of(numbers)
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    shape = (x.shape[0], w.shape[0], *size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def convolve_codes(
    x: Tensor, w: Tensor, scale: Tensor, zero_point: int, geometry: Geometry, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`scale` times the sum of `(x - zero_point) * w` over a convolution's window; the sum is exact.

    Args:
        x: uint8, shape (N, C, H, W), channels_last.
        w: int8, shape (O, C / groups, kH, kW).
        scale: float32, shape (1,) or (O,).
        zero_point: the code of `x` that stands for 0, and that padding consists of.
        geometry: of the convolution.
        dtype: of the result, float32 or bfloat16.

    Returns:
        Shape (N, O, H', W'), channels_last; no gradient.
    """
    result: Tensor = _convolve_codes(x, w, scale, zero_point, geometry.numbers(), dtype)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exact(
    x_max: int, zero_point: int, w_min: int, w_max: int, weight_shape: tuple[int, ...], geometry: tuple[Any, ...]
) -> bool:
    """Whether `convolve_codes` is exact on this CPU for codes 0 .. `x_max` and `w_min` .. `w_max` in such a layer.

    Tried once per process on a few pixels of the layer's own shape: oneDNN chooses its kernel by shape, and without
    VNNI the kernel for depthwise convolutions is exact where those for other groups saturate. `geometry` is a
    `Geometry` as a plain tuple: a named one is no constant to torch.compile.
    """
    return _tried(x_max, zero_point, (w_min, w_max), weight_shape, Geometry(*geometry))


@functools.cache
def _tried(*key: Any) -> bool:
    # In a thread of its own: whatever traces the caller (fake tensors, torch.export) is set for the caller's thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try_extremes, *key).result()


def _try_extremes(
    x_max: int, zero_point: int, w_range: tuple[int, int], weight_shape: tuple[int, ...], geometry: Geometry
) -> bool:
    per_group = weight_shape[0] // geometry.groups
    # Four pixels beyond the window in each direction, so that some windows lie in the padding and some do not.
    size = [geometry.dilation[i] * (weight_shape[2 + i] - 1) + 1 + 3 * geometry.stride[i] for i in range(2)]
    x = torch.full((2, geometry.groups * weight_shape[1], *size), x_max, dtype=torch.uint8)
    x[1] = 0
    x[0, ::3, ::2] = 0
    x = x.contiguous(memory_format=torch.channels_last)
    for code in w_range:
        w = torch.full(weight_shape, code, dtype=torch.int8)
        try:
            found = convolve_codes(x, w, torch.ones(1), zero_point, geometry)
        except RuntimeError:  # a build of torch without oneDNN, or a CPU that it does not support
            return False
        # All weights are one number: it times the sum over the window, once for each group.
        window = torch.full((geometry.groups, *weight_shape[1:]), code, dtype=torch.float64)
        expected = torch.nn.functional.conv2d(x.double() - zero_point, window, None, *geometry)
        if not torch.equal(found, expected.float().repeat_interleave(per_group, dim=1)):
            return False
    return True
