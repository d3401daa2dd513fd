"""The fast forward of a quantized convolution or linear layer.

Both quantizers are run as they are; what differs is when and on what.

- Compiled, a quantizer's arithmetic is recomputed in the backward pass by way of `torch.utils.checkpoint`, fused with
  what produced its input. Kept is what the float network keeps, or less.
- Not compiled, one autograd function does quantizers and convolution. It keeps the float input, and goes through the
  images in blocks that stay in the cache, so that a quantizer costs one pass over memory and not one per operation.
- Where both tensors are integers that fit 8 bits, the forward convolution is an integer one (`integer`). Noise that
  is not on the grid is rounded at random, without bias, to steps of at most 1/8 bin for it, if that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.checkpoint import checkpoint

from qtemper.fast.integer import ACCUMULATOR_MAX, POINTWISE, Geometry, convolve_codes, is_exact
from qtemper.quantizer import NoiseSource, Quantizer

BLOCK = 2**20
"""Elements of a block of images: half a megabyte of float32, so that a few of them fit the second-level cache."""

MIN_STEPS = 8
"""Steps per bin below which noise is not put on a finer grid, but convolved as float numbers."""

MAX_STEPS = 64
"""More are of no use."""


class _Layer(Protocol):
    """What is needed of a quantized layer."""

    weight_quantizer: Quantizer | None
    act_quantizer: Quantizer | None

    @property
    def latent_weight(self) -> nn.Parameter: ...


_INEXACT = (13, 14, 15, 26, 28, 30, 41, 47, 52, 55, 56, 60, 61, 63)
"""Steps per bin whose float32 reciprocal, times a multiple of half of them, is not always exact."""


@dataclass(frozen=True)
class Packing:
    """How positions become 8-bit integers: `(position - zero_point) * steps + shift`.

    Attributes:
        zero_point: of the positions.
        steps: integers per bin; 1 for codes, 2 for codes with a zero point of one half, more for noise.
        shift: the integer that stands for zero.
        low: smallest integer.
        high: largest integer.
        integral: whether positions are codes, so that nothing is rounded here.
    """

    zero_point: float
    steps: int
    shift: int
    low: int
    high: int
    integral: bool

    def snap(self, positions: Tensor, noise: NoiseSource) -> Tensor:
        """Positions rounded at random to the finer grid; those on it, all codes among them, stay."""
        relative = positions - self.zero_point if self.zero_point else positions
        steps = torch.floor(relative * self.steps + noise.dither(positions))
        low, high = self.low - self.shift, self.high - self.shift
        value = torch.clamp(steps, low, high) * (1.0 / self.steps)
        return value + self.zero_point if self.zero_point else value

    def pack(self, positions: Tensor) -> Tensor:
        """Positions on the grid as uint8 or int8."""
        dtype = torch.int8 if self.low < 0 else torch.uint8
        if self.integral and self.steps == 1 and self.shift == 0:
            return positions.to(dtype)
        return torch.round((positions - self.zero_point) * self.steps + self.shift).to(dtype)


def _packing(quantizer: Quantizer, *, signed: bool) -> Packing | None:
    """The finest packing into int8 or uint8 that is allowed, or None if there is none."""
    if quantizer.grid.has_offset:
        return None
    # Half bins, so that only integers and strings decide: torch.compile would make variables of floats.
    qmin, qmax, _ = quantizer.grid.codes
    half = 1 if quantizer.grid.levels == "symmetric" else 0
    below, above = 2 * qmin + half, 2 * qmax + half
    if quantizer.integral:
        steps = 1 + half
    else:
        reach = quantizer.rounding.reach
        if reach is None or not _noise(quantizer):
            return None
        below, above = below - 2 * reach, above + 2 * reach
        steps = 2 * 127 // max(-below, above) if signed else 2 * 255 // (above - below)
        steps = min(steps, MAX_STEPS)
        while steps in _INEXACT or steps % (1 + half):
            steps -= 1
        if steps < MIN_STEPS:
            return None
    low, high = below * steps // 2, -(-above * steps // 2)
    shift = 0 if signed else -low
    if low + shift < (-128 if signed else 0) or high + shift > (127 if signed else 255):
        return None
    return Packing(-0.5 if half else 0.0, steps, shift, low + shift, high + shift, quantizer.integral)


@dataclass(frozen=True)
class _Plan:
    """Everything about a layer's forward that is no tensor."""

    linear: bool
    geometry: Geometry
    act: Packing | None
    weight: Packing | None
    dtype: torch.dtype


def supported(layer: nn.Module, input: Tensor) -> bool:
    """Whether a quantized layer's forward may be replaced: nothing else would see the difference."""
    # The public class's own forward, and nobody who listens to the quantizers (curvature.py does).
    own: Any = type(layer).__mro__[2]  # behind the quantized class and QuantLayer
    if isinstance(layer, nn.Conv2d):
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        fits = plain and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple) and input.dim() == 4
    else:
        fits = own.forward is nn.Linear.forward and input.dim() >= 2
    if not fits or input.dtype not in (torch.float32, torch.bfloat16) or layer.latent_weight.dtype != torch.float32:
        return False
    for quantizer in (layer.weight_quantizer, layer.act_quantizer):
        if not isinstance(quantizer, Quantizer) or not quantizer.enabled or not quantizer.grid.calibrated:
            return False
        if quantizer._forward_hooks or quantizer._forward_pre_hooks or quantizer._backward_hooks:
            return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def forward(layer: Any, input: Tensor) -> Tensor:
    """The output of a layer that is `supported`.

    Args:
        layer: a quantized `nn.Conv2d` or `nn.Linear`.
        input: (N, C, H, W), or (..., features).
    """
    act, weight = layer.act_quantizer, layer.weight_quantizer
    latent = layer.latent_weight
    linear = isinstance(layer, nn.Linear)
    geometry = POINTWISE if linear else Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    plan = _make_plan(act, weight, linear, geometry, input, latent)
    if torch.compiler.is_compiling():
        out = _compiled(act, weight, plan, input, latent)
    else:
        parameters = [p for q in (act, weight) for p in q.parameters()]
        out = _Blocked.apply(act, weight, plan, input, latent, *parameters)  # type: ignore[no-untyped-call]
    if layer.bias is not None:
        out = out + layer.bias.to(out.dtype)[:, None, None]
    return out.reshape(*input.shape[:-1], layer.out_features) if linear else out


def _pixels(x: Tensor, plan: _Plan) -> Tensor:
    """A linear layer's operand, (..., features), as images of one pixel; a convolution's as it is."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1], 1, 1) if plan.linear else x


def _make_plan(act: Quantizer, weight: Quantizer, linear: bool, geometry: Geometry, x: Tensor, latent: Tensor) -> _Plan:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    pair = _packing(act, signed=False), _packing(weight, signed=True)
    if device == "cpu" and act.spec.channel_axis is None and dtype in (torch.float32, torch.bfloat16):
        a, w = pair
        if a is not None and w is not None:
            largest = max(a.high - a.shift, a.shift) * max(-w.low, w.high) * math.prod(latent.shape[1:])
            if largest <= ACCUMULATOR_MAX and is_exact(a.high, a.shift, w.low, w.high, geometry.groups > 1):
                return _Plan(linear, geometry, a, w, dtype)
    return _Plan(linear, geometry, None, None, dtype)


def _output_scale(act: Quantizer, weight: Quantizer, plan: _Plan, x: Tensor, latent: Tensor) -> Tensor:
    """Real value of one step of the integers' product, shape (1,) or (channels,)."""
    assert plan.act is not None and plan.weight is not None  # noqa: PT018
    with torch.no_grad():
        scales = act.grid.scale(x.float()) * weight.grid.scale(latent)
        return (scales / (plan.act.steps * plan.weight.steps)).reshape(-1)


class _ConvolveCodes(torch.autograd.Function):
    """Forward a convolution of integers, backward that of the float tensors that they stand for."""

    @staticmethod
    def forward(
        x_hat: Tensor, w_hat: Tensor, x_codes: Tensor, w_codes: Tensor, scale: Tensor, shift: int, plan: _Plan
    ) -> Tensor:
        return convolve_codes(x_codes, w_codes, scale, shift, plan.geometry, plan.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.plan = inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, w_hat = ctx.saved_tensors
        grad_x, grad_w = _conv_backward(grad, x_hat, w_hat, ctx.plan, ctx.needs_input_grad[:2])
        return grad_x, grad_w, None, None, None, None, None


def _conv_backward(
    grad: Tensor, x_hat: Tensor, w_hat: Tensor, plan: _Plan, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = (list(p) if isinstance(p, tuple) else p for p in plan.geometry)
    x, w = x_hat.to(grad.dtype), w_hat.to(grad.dtype)
    mask = [wanted[0], wanted[1], False]
    found = torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    return (
        found[0].to(x_hat.dtype) if mask[0] else None,
        found[1].to(w_hat.dtype) if mask[1] else None,
    )


def _quantize(quantizer: Quantizer, packing: Packing | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Fake-quantized values, and the integers that they are made of (empty where there are none)."""
    if packing is None:
        x_hat, positions = quantizer.quantize(x)
        return x_hat, positions.new_empty(0)
    snap = None if packing.integral else partial(packing.snap, noise=_noise(quantizer)[0])
    x_hat, positions = quantizer.quantize(x, snap)
    return x_hat, packing.pack(positions)


def _compiled(act: Quantizer, weight: Quantizer, plan: _Plan, x: Tensor, latent: Tensor) -> Tensor:
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    x_hat, x_codes = recompute(partial(_quantize, act, plan.act), x)
    w_hat, w_codes = _quantize(weight, plan.weight, latent)  # small, and used far from where it is made
    x_hat, w_hat = _pixels(x_hat, plan), _pixels(w_hat, plan)
    if plan.act is None:
        return _convolve(x_hat, w_hat, plan)
    x_codes, w_codes = _pixels(x_codes, plan), _pixels(w_codes, plan)
    scale = _output_scale(act, weight, plan, x, latent)
    result: Tensor = _ConvolveCodes.apply(x_hat, w_hat, x_codes, w_codes, scale, plan.act.shift, plan)  # type: ignore[no-untyped-call]
    return result


def _convolve(x_hat: Tensor, w_hat: Tensor, plan: _Plan) -> Tensor:
    stride, padding, dilation, groups = plan.geometry
    return conv2d(x_hat.to(plan.dtype), w_hat.to(plan.dtype), None, stride, padding, dilation, groups)


class _Blocked(torch.autograd.Function):
    """Quantizers and convolution in one; keeps the float input and the latent weight."""

    @staticmethod
    def forward(
        ctx: Any, act: Quantizer, weight: Quantizer, plan: _Plan, x: Tensor, latent: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.act, ctx.weight, ctx.plan = act, weight, plan
        ctx.modes = act.training, weight.training
        # The keys only so that autograd notices if noise is drawn anew before the backward pass has drawn it again.
        ctx.save_for_backward(x, latent, *parameters, *(noise.key for noise in _noise(act, weight)))
        w_hat, w_codes = (_pixels(t, plan) for t in _quantize(weight, plan.weight, latent))
        if plan.act is None:
            x_hat = _by_blocks(act, x, lambda block: act.quantize(block)[0], plan.dtype)
            return _convolve(_pixels(x_hat, plan), w_hat, plan)
        packing = plan.act
        x_codes = _by_blocks(act, x, lambda block: _quantize(act, packing, block)[1], torch.uint8)
        scale = _output_scale(act, weight, plan, x, latent)
        return convolve_codes(_pixels(x_codes, plan), w_codes, scale, packing.shift, plan.geometry, plan.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        act, weight, plan = ctx.act, ctx.weight, ctx.plan
        x, latent, *parameters = ctx.saved_tensors[: len(ctx.needs_input_grad) - 3]
        wanted = ctx.needs_input_grad[3:]
        modes = act.training, weight.training
        act.training, weight.training = ctx.modes
        try:
            if torch.is_grad_enabled():  # a derivative of this derivative is wanted
                found = _differentiable(act, weight, plan, (x, latent, *parameters), wanted, grad)
            else:
                found = _backward_by_blocks(act, weight, plan, (x, latent, *parameters), wanted, grad)
        finally:
            act.training, weight.training = modes
        return None, None, None, *found


Inputs = tuple[Tensor, ...]
"""Input, latent weight, and the parameters of both quantizers."""


def _differentiable(
    act: Quantizer, weight: Quantizer, plan: _Plan, inputs: Inputs, wanted: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """The gradients in plain operations, differentiable any number of times."""
    x_hat, w_hat = _quantize(act, plan.act, inputs[0])[0], _quantize(weight, plan.weight, inputs[1])[0]
    out = _convolve(_pixels(x_hat, plan), _pixels(w_hat, plan), plan)
    found = iter(
        torch.autograd.grad(
            out, [t for t, w in zip(inputs, wanted, strict=True) if w], grad, create_graph=True, allow_unused=True
        )
    )
    return [next(found) if w else None for w in wanted]


def _backward_by_blocks(
    act: Quantizer, weight: Quantizer, plan: _Plan, inputs: Inputs, wanted: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    x, latent, *parameters = inputs
    split = len(list(act.parameters()))
    with torch.enable_grad():
        w_leaf = latent.detach().requires_grad_()
        w_hat = _quantize(weight, plan.weight, w_leaf)[0]
    x_hat = _by_blocks(act, x, lambda block: _quantize(act, plan.act, block)[0], grad.dtype)
    for_act = wanted[0] or any(wanted[2 : 2 + split])
    for_weight = wanted[1] or any(wanted[2 + split :])
    grad_x, grad_w = _conv_backward(
        grad, _pixels(x_hat, plan), _pixels(w_hat.detach(), plan), plan, (for_act, for_weight)
    )
    result: list[Tensor | None] = [None] * len(inputs)
    if grad_w is not None:
        found = _gradients(w_hat, [w_leaf, *parameters[split:]], grad_w.reshape(w_hat.shape))
        result[1], result[2 + split :] = found[0], found[1:]
    if grad_x is not None:
        grad_x = grad_x.reshape(x.shape)
        result[0] = torch.empty_like(x) if wanted[0] else None
        sums: list[Tensor | None] = [None] * split
        for first, block in _blocks(act, x):
            rows = slice(first, first + len(block))
            with torch.enable_grad():
                leaf = block.detach().requires_grad_()
                out = _quantize(act, plan.act, leaf)[0]
            found = _gradients(out, [leaf, *parameters[:split]], grad_x[rows].to(out.dtype))
            if result[0] is not None and found[0] is not None:
                result[0][rows] = found[0]
            sums = [s if f is None else f if s is None else s + f for s, f in zip(sums, found[1:], strict=True)]
        result[2 : 2 + split] = sums
    return result


def _gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, allow_unused=True)
    result: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result


def _noise(*quantizers: Quantizer) -> list[NoiseSource]:
    return [module for q in quantizers for module in q.modules() if isinstance(module, NoiseSource)]


def _blocks(act: Quantizer, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Groups of samples with the number of the first, while the quantizer's noise knows which they are."""
    sources = _noise(act)
    size = max(1, BLOCK // max(x[:1].numel(), 1))
    try:
        for first in range(0, len(x), size):
            for source in sources:
                source.block = (first, len(x))
            yield first, x[first : first + size]
    finally:
        for source in sources:
            source.block = None


def _by_blocks(act: Quantizer, x: Tensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """A function of each block's elements, written into one tensor of the input's memory format."""
    out = torch.empty_like(x, dtype=dtype)
    with torch.no_grad():
        for first, block in _blocks(act, x):
            out[first : first + len(block)] = function(block)
    return out
