"""The fast forward of a quantized convolution or linear layer.

Both quantizers are run as they are; what differs is when and on what.

- Compiled, a quantizer's arithmetic is recomputed in the backward pass by way of `torch.utils.checkpoint`, fused with
  what produced its input. Kept is what the float network keeps, or less; of noisy tensors also the 8-bit codes, so that
  noise is drawn once.
- Not compiled, one autograd function does quantizers and convolution (`blocks`).
- Where both tensors are integers that fit 8 bits (`packing`), the forward convolution is one of integers (`integer`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qtemper.fast.blocks import quantize_and_convolve
from qtemper.fast.convolution import Convolution, convolve, convolve_backward, convolve_integers, pixels
from qtemper.fast.integer import POINTWISE, Geometry
from qtemper.fast.packing import quantize
from qtemper.fast.plan import LayerPlan, output_scale, plan_layer
from qtemper.leaf import leaf
from qtemper.quantizer import Quantizer


def supported(layer: nn.Module, input: Tensor) -> bool:
    """Whether a quantized layer's forward may be replaced: nothing else would see the difference."""
    # The public class's own forward, and nobody who listens to the quantizers (curvature.py does).
    own: Any = type(layer).__mro__[2]  # behind the quantized class and QuantLayer
    if isinstance(layer, nn.Conv2d):
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        fits = plain and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple) and input.dim() == 4
    else:
        fits = own.forward is nn.Linear.forward and input.dim() >= 2
    device = input.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if not fits or input.dtype not in ((torch.float32, torch.bfloat16) if autocast else (torch.float32,)):
        return False
    for quantizer in (layer.weight_quantizer, layer.act_quantizer):
        if not isinstance(quantizer, Quantizer) or not quantizer.enabled or not quantizer.grid.calibrated:
            return False
        if quantizer._forward_hooks or quantizer._forward_pre_hooks:
            return False
        if quantizer._backward_hooks or quantizer._backward_pre_hooks:
            return False
    if layer.latent_weight.dtype != torch.float32:
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
    plan = plan_layer(act, weight, linear, geometry, input, latent)
    if torch.compiler.is_compiling():
        out = _compiled(act, weight, plan, input, latent)
    else:
        out = quantize_and_convolve(act, weight, plan, input, latent)
    if layer.bias is not None:
        out = out + layer.bias.to(out.dtype)[:, None, None]
    return out.reshape(*input.shape[:-1], layer.out_features) if linear else out


class _ConvolveCodes(torch.autograd.Function):
    """Forward a convolution of integers, backward that of the float tensors that they stand for."""

    @staticmethod
    def forward(
        x_hat: Tensor,
        w_hat: Tensor,
        x_codes: Tensor,
        w_codes: Tensor,
        scale: Tensor,
        shift: int,
        numbers: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        return convolve_integers(x_codes, w_codes, scale, shift, Convolution.of(numbers, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.convolution = Convolution.of(*inputs[-2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, w_hat = ctx.saved_tensors
        grad_x, grad_w = convolve_backward(grad, x_hat, w_hat, ctx.convolution, ctx.needs_input_grad[:2])
        return grad_x, grad_w, None, None, None, None, None, None


@leaf(
    "(Tensor x_hat, Tensor w_hat, Tensor x_codes, Tensor w_codes, Tensor scale, int shift, int[] numbers, "
    "ScalarType dtype) -> Tensor"
)
def _convolve_quantized(*args: Any) -> Tensor:
    out: Tensor = _ConvolveCodes.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _keep_codes() -> Any:
    """Of what a checkpointed region computes, codes are kept for the backward pass."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        codes = op is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (torch.uint8, torch.int8)
        return CheckpointPolicy.MUST_SAVE if codes else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


# Or no graph with it would be cached. To be changed with the policy, which the cache cannot see.
_keep_codes.cache_hash = "qtemper keeps codes, 2"  # type: ignore[attr-defined]
# torch warns of a context_fn because in-place operations in the region would break it; compiled, a quantizer has none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn is passed" not in record.msg)


def _compiled(act: Quantizer, weight: Quantizer, plan: LayerPlan, x: Tensor, latent: Tensor) -> Tensor:
    convolution = plan.convolution
    half = convolution.dtype != torch.float32
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    keep = _keep_codes
    # Asking for its attribute lets the compiler know the function, without which it does not take it.
    again_from_codes = partial(again, context_fn=keep) if keep.cache_hash else again  # type: ignore[attr-defined]
    noisy = plan.act is not None and plan.act.noisy
    x_hat, x_codes = (again_from_codes if noisy else again)(partial(quantize, act, plan.act, half=half), x)
    if plan.weight is not None and plan.weight.noisy:
        w_hat, w_codes = again_from_codes(partial(quantize, weight, plan.weight, half=half), latent)
    else:
        w_hat, w_codes = quantize(weight, plan.weight, latent, half=half)  # small, and used far from where it is made
    x_hat, w_hat = pixels(x_hat, convolution), pixels(w_hat, convolution)
    if plan.act is None:
        return convolve(x_hat, w_hat, convolution)
    x_codes, w_codes = pixels(x_codes, convolution), pixels(w_codes, convolution)
    scale = output_scale(act, weight, plan, x, latent)
    return _convolve_quantized(
        x_hat, w_hat, x_codes, w_codes, scale, plan.act.shift, convolution.numbers(), convolution.dtype
    )
