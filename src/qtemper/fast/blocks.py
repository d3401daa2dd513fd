"""The fast forward without a compiler: quantizers and convolution as one autograd function, by blocks of samples.

In plain operations a quantizer costs one pass over memory for each. A block of samples goes through all of them while
it is in the cache, and nothing but the float input is kept: the backward pass runs the quantizers again, once, and
keeps their graph for as long as the gradient of that layer's convolution takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qtemper.fast.convolution import convolve, convolve_backward, convolve_integers, pixels
from qtemper.fast.packing import codes_of, fake_quantize, noise_of
from qtemper.fast.plan import LayerPlan, output_scale
from qtemper.quantizer import Quantizer

BLOCK = 2**21
"""Elements of a block on a CPU: of 2**17 to 2**22 the best for ResNet-20; ResNet-18 hardly minds, above 2**19."""


def quantize_and_convolve(act: Quantizer, weight: Quantizer, plan: LayerPlan, x: Tensor, latent: Tensor) -> Tensor:
    """The output of a layer without its bias; a linear layer's as images of one pixel."""
    places = _places(act, weight)
    parameters = [values[name] for values, name in places]
    result: Tensor = _Blocked.apply(act, weight, plan, places, x, latent, *parameters)  # type: ignore[no-untyped-call]
    return result


class _Blocked(torch.autograd.Function):
    """Quantizers and convolution in one; keeps the float input and the latent weight."""

    @staticmethod
    def forward(
        ctx: Any,
        act: Quantizer,
        weight: Quantizer,
        plan: LayerPlan,
        places: _Places,
        x: Tensor,
        latent: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.act, ctx.weight, ctx.plan, ctx.places = act, weight, plan, places
        ctx.modes = act.training, weight.training
        # The keys only so that autograd notices if noise is drawn anew before the backward pass has drawn it again.
        ctx.save_for_backward(x, latent, *parameters, *(noise.key for noise in noise_of(act, weight)))
        a, w, convolution = plan.act, plan.weight, plan.convolution
        if a is None or w is None:
            x_hat = _by_blocks(act, x, lambda block: fake_quantize(act, None, block), convolution.dtype)
            w_hat = fake_quantize(weight, None, latent)
            return convolve(pixels(x_hat, convolution), pixels(w_hat, convolution), convolution)
        x_codes = _by_blocks(act, x, lambda block: codes_of(act, a, block), torch.uint8)
        w_codes = codes_of(weight, w, latent)
        scale = output_scale(act, weight, plan, x, latent)
        return convolve_integers(
            pixels(x_codes, convolution), pixels(w_codes, convolution), scale, a.shift, convolution
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        act, weight, plan = ctx.act, ctx.weight, ctx.plan
        x, latent, *parameters = ctx.saved_tensors[: len(ctx.needs_input_grad) - 4]
        wanted = ctx.needs_input_grad[4:]
        modes = act.training, weight.training
        act.training, weight.training = ctx.modes
        # The parameters of the forward pass, which `torch.func.functional_call` has put away, and each as a tensor of
        # its own: one may be in two places, or in a layer that is used twice, where `x` depends on it as well.
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            gradients = _differentiable
            latent, *parameters = (t.view_as(t) for t in (latent, *parameters))
        else:
            gradients = _backward_by_blocks
            parameters = [t.detach().requires_grad_(t.requires_grad) for t in parameters]
        try:
            with _filled(ctx.places, parameters):
                found = gradients(act, weight, plan, (x, latent, *parameters), wanted, grad)
        finally:
            act.training, weight.training = modes
        return None, None, None, None, *found


_Places = list[tuple[dict[str, Any], str]]


def _places(*quantizers: Quantizer) -> _Places:
    """Where their parameters are, a shared one in several places."""
    modules = [module for quantizer in quantizers for module in quantizer.modules()]
    return [(m._parameters, name) for m in modules for name, value in m._parameters.items() if value is not None]


@contextmanager
def _filled(places: _Places, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters."""
    own = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), tensor in zip(places, tensors, strict=True):
            parameters[name] = tensor
        yield
    finally:
        for (parameters, name), tensor in zip(places, own, strict=True):
            parameters[name] = tensor


_Inputs = tuple[Tensor, ...]
"""Input, latent weight, and the parameters of both quantizers."""


def _differentiable(
    act: Quantizer, weight: Quantizer, plan: LayerPlan, inputs: _Inputs, wanted: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """The gradients in plain operations, differentiable any number of times."""
    x_hat, w_hat = fake_quantize(act, plan.act, inputs[0]), fake_quantize(weight, plan.weight, inputs[1])
    convolution = plan.convolution
    out = convolve(pixels(x_hat, convolution), pixels(w_hat, convolution), convolution)
    found = iter(
        torch.autograd.grad(
            out, [t for t, w in zip(inputs, wanted, strict=True) if w], grad, create_graph=True, allow_unused=True
        )
    )
    return [next(found) if w else None for w in wanted]


def _backward_by_blocks(
    act: Quantizer, weight: Quantizer, plan: LayerPlan, inputs: _Inputs, wanted: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    x, latent, *parameters = inputs
    convolution = plan.convolution
    for_act = wanted[0] or any(p.requires_grad for p in act.parameters())
    for_weight = wanted[1] or any(p.requires_grad for p in weight.parameters())
    with torch.enable_grad():
        w_leaf = latent.detach().requires_grad_()
        w_hat = fake_quantize(weight, plan.weight, w_leaf)
        parts = []
        for rows, block in _blocks(act, x):
            leaf = block.detach().requires_grad_(for_act)
            parts.append((rows, leaf, fake_quantize(act, plan.act, leaf)))
    x_hat = _joined(x, [(rows, out.detach()) for rows, _, out in parts], grad.dtype)
    grad_x, grad_w = convolve_backward(
        grad, pixels(x_hat, convolution), pixels(w_hat.detach(), convolution), convolution, (for_act, for_weight)
    )
    del x_hat
    outs, grads = [], []
    if grad_x is not None:
        outs = [out for _, _, out in parts]
        grads = [grad_x.reshape(x.shape)[rows].to(out.dtype) for rows, _, out in parts]
    if grad_w is not None:
        outs.append(w_hat)
        grads.append(grad_w.reshape(w_hat.shape))
    grad_latent, *found = _gradients(outs, [w_leaf, *parameters, *(leaf for _, leaf, _ in parts)], grads)
    found, pieces = found[: len(parameters)], found[len(parameters) :]
    some = [(rows, piece) for (rows, _, _), piece in zip(parts, pieces, strict=True) if piece is not None]
    result = [_joined(x, some, x.dtype) if some or not parts else None, grad_latent, *found]
    return [g if w else None for g, w in zip(result, wanted, strict=True)]


def _gradients(outs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
    """Of those inputs that require one, by those outputs that have one; None for the others."""
    found: list[Tensor | None] = [None] * len(inputs)
    bent = [i for i, out in enumerate(outs) if out.requires_grad]
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    if bent and wanted:
        some = [outs[i] for i in bent], [inputs[i] for i in wanted], [grads[i] for i in bent]
        for i, gradient in zip(wanted, torch.autograd.grad(*some, allow_unused=True), strict=True):
            found[i] = gradient
    return found


def _blocks(act: Quantizer, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Groups of samples with their place, while the quantizer's noise knows which they are."""
    sources = noise_of(act)
    size = max(1, BLOCK // max(x[:1].numel(), 1)) if x.device.type == "cpu" else max(1, len(x))
    try:
        for first in range(0, len(x), size):
            for source in sources:
                source.block = (first, len(x))
            rows = slice(first, first + size)
            yield rows, x[rows]
    finally:
        for source in sources:
            source.block = None


def _by_blocks(act: Quantizer, x: Tensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """A function of each block's elements, written into one tensor of the input's memory format."""
    with torch.no_grad():
        return _joined(x, ((rows, function(block)) for rows, block in _blocks(act, x)), dtype)


def _joined(x: Tensor, parts: Iterable[tuple[slice, Tensor]], dtype: torch.dtype) -> Tensor:
    """Blocks as one tensor in the memory format of `x`."""
    out = None
    for rows, part in parts:
        if out is None:
            if part.shape == x.shape and part.dtype == dtype and part.stride() == x.stride():
                return part  # the only one
            out = torch.empty_like(x, dtype=dtype)
        out[rows] = part
    return torch.empty_like(x, dtype=dtype) if out is None else out  # a batch of no images
