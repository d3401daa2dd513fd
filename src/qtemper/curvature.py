"""Mean Hessian diagonal of the loss with respect to every quantized tensor: what EWGS's delta is made of.

Hutchinson's estimator with Rademacher vectors. All tensors share one double backward: the probes are independent,
so the cross terms between tensors have mean zero, and a draw costs one backward pass instead of one per quantizer
(the authors' code runs one per quantizer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtemper.counter import counter_bits, derive_key
from qtemper.modes import eval_mode
from qtemper.quantizer import Quantizer, quantizers


@dataclass(frozen=True)
class Curvature:
    """What one quantizer's tensor showed, in units of its bins.

    Attributes:
        mean_diagonal: mean diagonal entry of the Hessian, loss / bin^2.
        gradient_std: standard deviation of the gradient's elements, loss / bin.
    """

    mean_diagonal: float
    gradient_std: float


def update_curvature(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    max_draws: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, Curvature]:
    """Measure the curvature and hand it to every rounding that asks for it (`Rounding.wants_curvature`).

    The model runs in eval mode: hard quantization, no noise, batch-norm statistics untouched.

    Args:
        model: a prepared, calibrated model; its mode is kept.
        batches: the estimate is the mean over them; on the model's device.
        loss: `loss(model, batch)`, a scalar.
        max_draws: Rademacher draws per batch, at most.
        tolerance: a batch ends early when no running mean moved by more than this fraction.
        seed: of the draws.

    Returns:
        The curvature by quantizer name, without those that no batch reached.

    Raises:
        ValueError: no batches.
    """
    targets = {name: q for name, q in quantizers(model) if q.rounding.wants_curvature}
    if not targets:
        return {}
    with eval_mode(model):
        found = [_one_batch(model, targets, loss, b, max_draws, tolerance, (seed, i)) for i, b in enumerate(batches)]
    if not found:
        raise ValueError("update_curvature got no batches; pass at least one.")
    means = torch.tensor(found, dtype=torch.float64).nanmean(dim=0)
    result = {}
    for (name, quantizer), (diagonal, std) in zip(targets.items(), means.tolist(), strict=True):
        if math.isfinite(diagonal):
            result[name] = Curvature(diagonal, std)
            quantizer.rounding.set_curvature(diagonal, std)
    return result


def _one_batch(
    model: nn.Module,
    targets: dict[str, Quantizer],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    max_draws: int,
    tolerance: float,
    key: tuple[int, int],
) -> list[tuple[float, float]]:
    value, outputs = _watched_loss(model, targets, loss, batch)
    flat = [(name, out) for name, outs in outputs.items() for out in outs]
    tensors = [out for _, out in flat]
    # One bin of each tensor: derivatives per bin are derivatives per unit times this.
    bins = [targets[name].grid.scale(out).detach() for name, out in flat]
    gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True, materialize_grads=True)
    bent = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]  # the loss is linear in the others
    total = dict.fromkeys(targets, 0.0)
    previous = means = dict(total)
    for draw in range(1, max_draws + 1):
        signs = [_rademacher(out, *key, draw, i) for i, out in enumerate(tensors)]
        products = (
            torch.autograd.grad(
                [gradients[i] for i in bent],
                tensors,
                [signs[i] * bins[i] for i in bent],
                retain_graph=True,
                allow_unused=True,
            )
            if bent
            else [None] * len(tensors)
        )
        sums = [
            b.new_zeros(()) if product is None else (sign * b * product).sum()
            for sign, b, product in zip(signs, bins, products, strict=True)
        ]
        # Read at once: a GPU would have to be waited for at each.
        for (name, out), found in zip(flat, torch.stack([s.to(value.device) for s in sums]).tolist(), strict=True):
            total[name] += found / (out.numel() * len(outputs[name]))
        means = {name: t / draw for name, t in total.items()}
        if draw > 1 and all(abs(means[n] - previous[n]) <= tolerance * (abs(means[n]) + 1e-12) for n in means):
            break
        previous = means
    stds: dict[str, list[Tensor]] = {name: [] for name in targets}
    for (name, _), gradient, b in zip(flat, gradients, bins, strict=True):
        stds[name].append((gradient.detach() * b).reshape(-1))
    return [
        (means[n], float(torch.cat(stds[n]).std(correction=0))) if stds[n] else (math.nan, math.nan) for n in targets
    ]


def _watched_loss(
    model: nn.Module, targets: dict[str, Quantizer], loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The loss, and what the quantizers gave on the way, by name."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in targets}

    def keep(name: str, out: Tensor) -> Tensor:
        seen = outputs[name]
        if seen and name.endswith("weight_quantizer"):  # of a layer that is used twice: one tensor, one Hessian
            return seen[0]
        # Frozen weights and fixed input scales have no gradient of their own, and a curvature all the same.
        seen.append(out if out.requires_grad else out.detach().requires_grad_())
        return seen[-1]

    hooks = [
        quantizer.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        for name, quantizer in targets.items()
    ]
    try:
        value = loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return value, outputs


def _rademacher(like: Tensor, *words: int) -> Tensor:
    # Made where it is used: a network's activations are many to draw on the host and to copy.
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    bits = counter_bits(index, torch.tensor(derive_key(*words), dtype=torch.int32))
    return (1 - 2 * (bits & 1)).to(like.dtype).view(like.shape)
