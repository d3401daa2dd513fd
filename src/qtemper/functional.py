"""Pure maths of fake quantization: ranges, encode and decode, rounding gradients, counter-based noise.

Symbols, used with the same meaning in the whole package:

| symbol | meaning | unit |
|---|---|---|
| `x` | real values | the tensor's own |
| `scale` (s) | bin size, > 0 | the tensor's own |
| `v` | position on the grid, `clamp(x / scale + zero_point, qmin, qmax)` | bins |
| `codes` (q) | integers in `[qmin, qmax]`, `round(v)` | bins |
| `zero_point` | the code that stands for x = 0; half an integer on mid-rise grids | bins |
| `e` | quantization error, `v - round(v)` | bins |
| `x_hat` | dequantized values, `(codes - zero_point) * scale` | the tensor's own |

Every function here accepts any shape and float dtype unless it says otherwise.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Levels = Literal["unsigned", "signed", "symmetric"]
"""Kinds of uniform grid; see `code_range`."""

SCALE_FLOOR = 1e-8
"""Smallest bin size a learned scale can take (docs/decisions/0003)."""


class CodeRange(NamedTuple):
    """Smallest and largest code of a grid, and the code that stands for zero, all in bins."""

    qmin: int
    qmax: int
    zero_point: float


def code_range(bits: int, levels: Levels) -> CodeRange:
    """The codes of a uniform grid with `2**bits` levels.

    | levels | codes | zero point | for |
    |---|---|---|---|
    | `unsigned` | 0 .. 2^b - 1 | 0 | activations after a ReLU |
    | `signed` | -2^(b-1) .. 2^(b-1) - 1 | 0 | two's complement; its two levels at b = 1 are -s and 0 |
    | `symmetric` | -2^(b-1) .. 2^(b-1) - 1 | -1/2 | mid-rise: odd multiples of s/2, no zero level |

    Raises:
        ValueError: if `bits` is not in 1..8, or `levels` is unknown.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}; leave a tensor in float with bits=32 in the policy.")
    half = 2 ** (bits - 1)
    if levels == "unsigned":
        return CodeRange(0, 2**bits - 1, 0.0)
    if levels == "signed":
        return CodeRange(-half, half - 1, 0.0)
    if levels == "symmetric":
        return CodeRange(-half, half - 1, -0.5)
    raise ValueError(f"levels must be 'unsigned', 'signed' or 'symmetric', got {levels!r}.")


def encode(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Position on the grid, `v = clamp(x / scale + zero_point, qmin, qmax)`; not rounded.

    Gradients are autograd's: to `x` and `scale` inside the range (bounds included), zero outside.
    """
    return torch.clamp(x / scale + codes.zero_point, codes.qmin, codes.qmax)


def decode(v: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Real values of grid positions, `(v - zero_point) * scale`. The inverse of `encode` inside the range."""
    return (v - codes.zero_point) * scale


class _RoundSTE(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return torch.round(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_ste(v: Tensor) -> Tensor:
    """Round to the nearest integer (ties to even); the gradient passes unchanged.

    Forward `round(v)`, backward `dL/dv = g`: the straight-through estimator (Bengio et al., arXiv 1308.3432).
    """
    return _apply(_RoundSTE, v)


class _ReplaceValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(path: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replace_value(path: Tensor, value: Tensor) -> Tensor:
    """Forward `value`, backward `dL/dpath = g`, nothing to `value`: any surrogate, straight through."""
    return _apply(_ReplaceValue, path, value)


class _ElementwiseGradientScaling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, value: Tensor, delta: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Inputs only: `v - value` saved as a constant would give a silently wrong second derivative.
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        v, value, delta = ctx.saved_tensors
        factor = 1 + delta * torch.sign(grad) * (v - value)
        return grad * factor.clamp_min(0), None, None


def elementwise_gradient_scaling(v: Tensor, value: Tensor, delta: Tensor) -> Tensor:
    """Forward `value`; backward scales each element's gradient by its own discretization error.

        dL/dv = g * max(0, 1 + delta * sign(g) * (v - value))

    Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, eq. 3, with the error in
    bins. The factor is never negative for `delta` in [0, 2) and `value = round(v)`; with noise in `value` the
    error can be larger than half a bin, so the factor is clamped at zero.

    Args:
        v: position on the grid, in bins.
        value: what the forward pass returns, in bins; gets no gradient, but second derivatives see its graph.
        delta: scale of the correction, shape (), in 1 / bins; gets no gradient.
    """
    return _apply(_ElementwiseGradientScaling, v, value, delta)


class _DecodeLearnedStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, v: Tensor, scale: Tensor, qmin: int, qmax: int, zero_point: float) -> Tensor:
        return (value - zero_point) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        value, v, scale, ctx.qmin, ctx.qmax, ctx.zero_point = inputs
        ctx.save_for_backward(value, v, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        value, v, scale = ctx.saved_tensors
        inside = (v > ctx.qmin) & (v < ctx.qmax)
        residual = value - torch.where(inside, v, ctx.zero_point)
        return grad * scale, None, _sum_to(grad * residual, scale.shape), None, None, None


def decode_learned_step(value: Tensor, v: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """`decode` with the gradient that trains the step of Learned Step Size Quantization.

        dL/dvalue = g * s
        dL/ds = sum g * (value - v) inside the range;  sum g * (qmin or qmax - zero_point) where clipped

    Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 3. The path through `x / s` is contained in
    this formula, so `v` must come from `encode` with a detached scale; a factor on the gradient of `x` (as in
    `elementwise_gradient_scaling`) then stays out of `dL/ds`.

    Args:
        value: rounded, or otherwise perturbed, position, in bins.
        v: the position before rounding, in bins.
        scale: bin size, shape () or broadcastable to `v`.
        codes: the grid's range.
    """
    return _apply(_DecodeLearnedStep, value, v, scale, *codes)


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Forward `x`, backward `g * factor`."""
    return _apply(_ScaleGradient, x, factor)


class _Positive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, floor: float) -> Tensor:
        return x.clamp_min(floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def positive(x: Tensor, floor: float = SCALE_FLOOR) -> Tensor:
    """`max(x, floor)`; the gradient passes even below the floor, so that a step can come back up."""
    return _apply(_Positive, x, floor)


class _ProbeCurvature(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (noise,) = ctx.saved_tensors
        g = grad.detach()
        ones = torch.ones((), dtype=g.dtype, device=g.device) * g.numel()
        sums = [(g * noise).sum(), (noise * noise).sum(), g.sum(), (g * g).sum(), ones]
        return grad, None, torch.stack(sums)


def probe_curvature(value: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
    """Forward `value`, backward `g`; `probe.grad` collects what the injected noise says of the curvature.

    With zero-mean noise eta added to a point, `sum(g * eta) / sum(eta^2)` estimates the mean diagonal of the
    Hessian there without bias (to second order). The sums travel as the gradient of a parameter that enters no
    forward value: that works under torch.compile, gradient accumulation and DistributedDataParallel alike.

    Args:
        value: noisy position, in bins.
        noise: the noise in `value`, same shape, in bins.
        probe: parameter of shape (5,); its gradient becomes
            `[sum g*noise, sum noise^2, sum g, sum g^2, number of elements]`.
    """
    return _apply(_ProbeCurvature, value, noise, probe)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    # Function.apply is untyped in torch's stubs; one cast here keeps the callers typed.
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo a broadcast: sum `x` down to `shape`."""
    if not shape:
        return x.sum()
    dims = [i for i in range(x.dim()) if shape[i] == 1 and x.shape[i] != 1]
    return x.sum(dims, keepdim=True) if dims else x


# --- counter-based noise -------------------------------------------------------------------------------------

_MASK64 = (1 << 64) - 1


def derive_key(*words: int) -> tuple[int, int]:
    """Hash integers (seed, step, quantizer, ...) into two independent signed 32-bit keys.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) absorbs one word after the other.
    """
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = _splitmix64(state ^ (word & _MASK64))
    low, high = state & 0xFFFFFFFF, state >> 32
    return _signed32(low), _signed32(high)


def _splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def counter_bits(index: Tensor, key: Tensor) -> Tensor:
    """32 pseudo-random bits for every counter value: a pure function, no generator state.

    C. Wellons' three-round `triple32` mixer, with one key word xor-ed in before the first round and the other added
    after it, so that streams of different keys are not shifts or permutations of one another. (His two-round mixer
    is cheaper but correlates elements 4,096 apart at up to 58 standard errors in 2**22 draws.) Not for cryptography.

    Args:
        index: int32 counters, any shape (an element's index in its tensor, or an image's in its data set).
        key: int32, shape (2,), from `derive_key`.

    Returns:
        int32, shape of `index`.
    """
    h = index ^ key[0]
    h = (h ^ _shift_right(h, 17)) * _signed32(0xED5AD4BB)
    h = h + key[1]
    h = (h ^ _shift_right(h, 11)) * _signed32(0xAC4C1B51)
    h = (h ^ _shift_right(h, 15)) * _signed32(0x31848BAB)
    return h ^ _shift_right(h, 14)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """Logical shift of int32 (torch's own is arithmetic)."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def counter_uniform(index: Tensor, key: Tensor) -> Tensor:
    """Uniform float32 in (0, 1), a pure function of `index` and `key` (see `counter_bits`).

    23 bits and a half: every value is exact in float32, 0 and 1 never occur, the distribution is symmetric.
    """
    return (_shift_right(counter_bits(index, key), 9).to(torch.float32) + 0.5) * 2.0**-23


def element_index(x: Tensor) -> Tensor:
    """Index of each element of `x` in row-major order, int32, shape of `x`; the memory format does not matter."""
    return torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)


def gaussian_from_uniform(u: Tensor) -> Tensor:
    """Standard normal by inversion; |result| < 5.3 because `u` keeps 2**-24 away from 0 and 1."""
    return math.sqrt(2.0) * torch.erfinv(2 * u - 1)
