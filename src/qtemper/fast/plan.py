"""What is to be computed for a layer, decided once per call: its geometry, its integers or none, its dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtemper.fast.convolution import Convolution
from qtemper.fast.integer import ACCUMULATOR_MAX, Geometry, is_exact
from qtemper.fast.packing import Packing, packing_of
from qtemper.loops import maximum
from qtemper.quantizer import Quantizer


@dataclass(frozen=True)
class LayerPlan:
    """Everything about a layer's forward that is no tensor."""

    convolution: Convolution
    act: Packing | None
    weight: Packing | None


def plan_layer(
    act: Quantizer, weight: Quantizer, linear: bool, geometry: Geometry, x: Tensor, latent: Tensor
) -> LayerPlan:
    """Integers where both quantizers' values fit 8 bits and the CPU is exact for them, float numbers elsewhere."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    channels_last = linear or _in_channels_last(x) or _in_channels_last(latent)
    convolution = Convolution(geometry, linear, channels_last, dtype)
    if device == "cpu" and act.spec.channel_axis is None and dtype in (torch.float32, torch.bfloat16):
        a, w = packing_of(act, signed=False), packing_of(weight, signed=True)
        if a is not None and w is not None:
            largest = max(a.high - a.shift, a.shift) * max(-w.low, w.high) * math.prod(latent.shape[1:])
            shape = (*latent.shape, 1, 1) if linear else tuple(latent.shape)
            if largest <= ACCUMULATOR_MAX and is_exact(a.high, a.shift, w.low, w.high, shape, tuple(geometry)):
                return LayerPlan(convolution, a, w)
    return LayerPlan(convolution, None, None)


def _in_channels_last(x: Tensor) -> bool:
    # By strides, as torch decides: of one channel, or of one pixel, `is_contiguous` says both.
    return x.stride(1) == 1 and x.stride(3) == x.shape[1]


def output_scale(act: Quantizer, weight: Quantizer, plan: LayerPlan, x: Tensor, latent: Tensor) -> Tensor:
    """Real value of one step of the integers' product, shape (1,) or (channels,).

    It is NaN if the latent weight contains NaN, which no integer can say, and outside training if the input does. In
    training that would cost a pass over memory a layer; there a NaN of the input is in the gradients of the same step,
    which are of float numbers, and so in the weights of the next.
    """
    assert plan.act is not None and plan.weight is not None  # noqa: PT018
    with torch.no_grad():
        scales = act.grid.scale(x.float()) * weight.grid.scale(latent)
        scale = (scales / (plan.act.steps * plan.weight.steps)).reshape(-1)
        # The largest of numbers with a NaN among them is NaN; a mask of all elements would cost ten times as much.
        largest = maximum(latent) if act.training or x.numel() == 0 else maximum(latent) + maximum(x)
        return torch.where(torch.isnan(largest), torch.nan, scale)
