"""Pure maths of fake quantization: ranges, encode and decode, and the gradients of rounding.

Symbols, used with the same meaning in the whole package:

| symbol | meaning | unit |
|---|---|---|
| `x` | real values | the tensor's own |
| `scale` (s) | bin size, > 0 | the tensor's own |
| `v` | position on the grid, `clamp(x / scale + zero_point, qmin, qmax)` | bins |
| `codes` (q) | integers in `[qmin, qmax]`, `round(v)` | bins |
| `limits` | the range of the codes: `qmin`, `qmax`, `zero_point` | bins |
| `zero_point` | the code that stands for x = 0; half an integer on mid-rise grids | bins |
| `e` | quantization error, `v - round(v)` | bins |
| `x_hat` | dequantized values, `(codes - zero_point) * scale` | the tensor's own |

Every function here accepts any shape and float dtype unless it says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qtemper.leaf import leaf
from qtemper.loops import Order, clamp_in_loops, in_memory, order_of_sums, partial_sums

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


def encode(x: Tensor, scale: Tensor, limits: CodeRange) -> Tensor:
    """Position on the grid, `v = clamp(x / scale + zero_point, qmin, qmax)`; not rounded.

    Gradients are autograd's: to `x` and `scale` inside the range (bounds included), zero outside.
    """
    return _encode(x, scale, *limits)


@leaf("(Tensor x, Tensor scale, int qmin, int qmax, float zero_point) -> Tensor")
def _encode(x: Tensor, scale: Tensor, qmin: int, qmax: int, zero_point: float) -> Tensor:
    # A reciprocal for the tensor, not a quotient for each element, which takes several times as long as a product.
    position = x * in_memory(scale.reciprocal())
    if zero_point:
        position = position + zero_point
    return position.clamp_(qmin, qmax) if _unseen() else clamp(position, qmin, qmax)


def decode(v: Tensor, scale: Tensor, limits: CodeRange) -> Tensor:
    """Real values of grid positions, `(v - zero_point) * scale`. The inverse of `encode` inside the range."""
    return (v - limits.zero_point) * scale if limits.zero_point else v * scale


class _Clamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return clamp_in_loops(x, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return keep_between(grad, x, _below(ctx.low), -_below(-ctx.high)), None, None


@leaf("(Tensor x, float low, float high) -> Tensor")
def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """`torch.clamp`, its gradient included (1 on the bounds), with a cheaper backward pass (see `keep_between`)."""
    return _apply(_Clamp, x, low, high)


def keep_between(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`values` where `low < x < high`, elsewhere 0.

    The one such operation of torch that is vectorised on a CPU: masks and `torch.where` cost 50 times as much.
    """
    return torch.ops.aten.hardtanh_backward(values, x, low, high)  # type: ignore[no-any-return]


def _below(x: float) -> float:
    """A number that float32 rounds to the next one below `x`."""
    return x - max(abs(x) * (2.0**-24 + 2.0**-44), 2.0**-120)


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


@leaf("(Tensor v) -> Tensor")
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


@leaf("(Tensor path, Tensor value) -> Tensor")
def replace_value(path: Tensor, value: Tensor) -> Tensor:
    """Forward `value`, backward `dL/dpath = g`, nothing to `value`: any surrogate, straight through."""
    return _apply(_ReplaceValue, path, value)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Forward `x`, backward `g * factor`."""
    return _replace_few(x * factor, x.detach()) if torch.is_grad_enabled() else x


@leaf("(Tensor path, Tensor value) -> Tensor")
def _replace_few(path: Tensor, value: Tensor) -> Tensor:
    """`replace_value` for scales: of a few elements two operations cost less than an autograd function.

    Above all torch.compile, which takes 50 ms to trace one. Exact where `path` is finite; infinity becomes NaN.
    """
    return value + (path - path.detach()) if torch.is_grad_enabled() else value


class _ElementwiseGradientScaling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, value: Tensor, delta: Tensor, sums: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Inputs only: `v - value` saved as a constant would give a silently wrong second derivative.
        ctx.save_for_backward(*inputs[:3])
        ctx.sums, ctx.order = inputs[3], order_of_sums(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        v, value, delta = ctx.saved_tensors
        if ctx.sums is not None:
            noise = (value - torch.round(v)).detach().to(torch.float32)
            _probe_curvature(grad.detach().to(torch.float32), noise, ctx.sums, ctx.order)
        factor = 1 + delta * torch.sign(grad) * (v - value)
        return grad * factor.clamp_min(0), None, None, None


@leaf("(Tensor v, Tensor value, Tensor delta, Tensor? sums=None) -> Tensor")
def elementwise_gradient_scaling(v: Tensor, value: Tensor, delta: Tensor, sums: Tensor | None = None) -> Tensor:
    """Forward `value`; backward scales each element's gradient by its own discretization error.

        dL/dv = g * max(0, 1 + delta * sign(g) * (v - value))

    Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, eq. 3, with the error in
    bins. The factor is never negative for `delta` in [0, 2) and `value = round(v)`; with noise in `value` the
    error can be larger than half a bin, so the factor is clamped at zero.

    With zero-mean noise eta in `value`, `sum(g * eta) / sum(eta^2)` estimates the mean diagonal of the Hessian there
    without bias (to second order); `sums` collects what that takes.

    Args:
        v: position on the grid, in bins.
        value: what the forward pass returns, in bins; gets no gradient, but second derivatives see its graph.
        delta: scale of the correction, shape (), in 1 / bins; gets no gradient.
        sums: float32 buffer, shape (5,), to which the backward pass adds
            `[sum g*eta, sum eta^2, sum g, sum g^2, number of elements]` with `eta = value - round(v)`; not within
            torch.func's transforms, whose functions must not change anything.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        sums = None
    return _apply(_ElementwiseGradientScaling, v, value, delta, sums)


def _probe_curvature(g: Tensor, noise: Tensor, sums: Tensor, order: Order) -> None:
    partial = [partial_sums(x, order) for x in (g * noise, noise * noise, g, g * g)]
    count = torch.full_like(partial[0], g.numel() / partial[0].numel())
    sums.add_(torch.stack([*partial, count]).sum(1))


class _DecodeLearnedStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, v: Tensor, scale: Tensor, qmin: int, qmax: int, zero_point: float) -> Tensor:
        scale = in_memory(scale.detach())
        return (value - zero_point) * scale if zero_point else value * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        value, v, scale, ctx.qmin, ctx.qmax, ctx.zero_point = inputs
        # The output is in memory anyway, so noise in `value` need not be drawn again (autograd knows its graph as it
        # knows that of an input). A compiler makes `value` again, from x or from kept codes, and reads less memory.
        ctx.by_value, ctx.order = torch.compiler.is_compiling(), order_of_sums(v)
        ctx.save_for_backward(value if ctx.by_value else output, v, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        rounded, v, scale = ctx.saved_tensors
        position = v - ctx.zero_point if ctx.zero_point else v
        inside = keep_between(position, v, ctx.qmin, ctx.qmax)
        if ctx.by_value:
            residual = inside - (rounded - ctx.zero_point if ctx.zero_point else rounded)  # negative
        else:
            addcmul, factor = torch.Tensor.addcmul_ if _unseen() else torch.addcmul, scale.detach().reciprocal()
            residual = addcmul(inside, rounded, factor, value=-1)  # the same in one pass
        # Detached: x / s in `encode` has a detached s, and dL/dx as a whole does not depend on s.
        grad_scale = -_sum_to(grad * residual, scale.shape, ctx.order)
        return grad * in_memory(scale.detach()), None, grad_scale, None, None, None


def decode_learned_step(value: Tensor, v: Tensor, scale: Tensor, limits: CodeRange) -> Tensor:
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
        limits: the grid's range.
    """
    return _decode_learned_step(value, v, scale, *limits)


@leaf("(Tensor value, Tensor v, Tensor scale, int qmin, int qmax, float zero_point) -> Tensor")
def _decode_learned_step(value: Tensor, v: Tensor, scale: Tensor, qmin: int, qmax: int, zero_point: float) -> Tensor:
    return _apply(_DecodeLearnedStep, value, v, scale, qmin, qmax, zero_point)


@leaf("(Tensor x) -> Tensor")
def positive(x: Tensor) -> Tensor:
    """`max(x, SCALE_FLOOR)`; the gradient passes even below the floor, so that a step can come back up."""
    # SCALE_FLOOR as a literal: torch.compile(dynamic=True) makes a variable of a global float, and then fails.
    return _replace_few(x, x.detach().clamp_min(max(1e-8, torch.finfo(x.dtype).tiny)))


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    # `Function.apply` first reads the signature, for torch.func's sake, which takes longer than a small operation does.
    # And where no gradient is wanted, it is its forward.
    apply: Any = function.apply
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        args = torch._functorch.utils.unwrap_dead_wrappers(args)
        graph = torch.is_grad_enabled()
        apply = super(torch.autograd.Function, function).apply if graph else function.forward  # type: ignore[misc]
    result: Tensor = apply(*args)
    return result


def _unseen() -> bool:
    """Whether nobody records what is computed, so that a temporary may be overwritten, in half the time.

    Not with a gradient: of many outputs at once (`is_grads_batched`) it has a dimension that the temporary has not.
    """
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not seen and not torch._C._are_functorch_transforms_active()


def _sum_to(x: Tensor, shape: torch.Size, order: Order) -> Tensor:
    """Undo a broadcast: sum `x` down to `shape`."""
    if not shape:
        return x.sum() if order == "any" else partial_sums(x, order).sum()
    dims = [i for i in range(x.dim()) if shape[i] == 1 and x.shape[i] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def other_dims(x: Tensor, axis: int | None) -> list[int]:
    """The dimensions of `x` that share a scale: all but the channel axis."""
    return [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]


def elements_per_scale(v: Tensor, channel_axis: int | None, *, batched: bool) -> int:
    """How many elements of one sample share a scale, at least 1: LSQ's N.

    Args:
        v: the tensor.
        channel_axis: dimension with one scale per index, or None for one scale per tensor.
        batched: whether dimension 0 is the batch, which does not count.
    """
    count = v.numel() // (max(v.shape[0], 1) if batched else 1)
    if channel_axis is not None:
        count //= max(v.shape[channel_axis], 1)
    return max(count, 1)
