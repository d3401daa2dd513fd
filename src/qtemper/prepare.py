"""`prepare`: put quantizers into a float model; the table of what is there; parameter groups for the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtemper import layers
from qtemper.counter import NoiseSource
from qtemper.errors import ConfigError, UnsupportedModuleError
from qtemper.fast.replace import replace_float_layers
from qtemper.methods import get_method
from qtemper.policy import FLOAT_BITS, BitPolicy, Granularity, Plan, Row, format_table, make_plan
from qtemper.quantizer import Method, Quantizer, QuantSpec, TensorKind, quantizers


def prepare(model: nn.Module, method: Method | str, policy: BitPolicy | Plan | str, *, seed: int = 0) -> nn.Module:
    """Put quantizers into a float model, in place. Prepare the whole model at once, before wrapping it.

    The layers become subclasses of what they were, and so do max pooling, batch norm and ReLU, for speed; parameters,
    keys of the float state dict, hooks and references stay. Everything the optimizer needs exists afterwards; the
    scales come from `calibrate` or a checkpoint.

    Args:
        model: the float model, on any device.
        method: a method or its name (see `qtemper.methods.available()`).
        policy: shorthand ("W4A4", "W1A32"), a `BitPolicy`, or an edited `Plan`.
        seed: of the noise; each quantizer draws its own stream from it and its name.

    Returns:
        The same model.

    Raises:
        ConfigError: unknown method; a rule that matches nothing; bits out of range; a policy that quantizes nothing.
        UnsupportedModuleError: a module cannot be quantized, or none is of a kind that can.
        ValueError: weights that are not finite.
    """
    method = get_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise ConfigError(f"method must be a name or an instance such as get_method('lsq'), got {method!r:.80}.")
    plan = policy if isinstance(policy, Plan) else make_plan(model, policy, method)
    by_layer: dict[str, dict[str, Row]] = {}
    for row in plan:
        by_layer.setdefault(row.layer, {})[row.tensor] = row
    known = {name for name, module in model.named_modules() if isinstance(module, layers.QUANTIZABLE)}
    for name in by_layer:
        if name not in known:
            raise ConfigError(f"the plan names {name!r}, which is no layer of this model; use make_plan on this model.")
        if isinstance(model.get_submodule(name), layers.QuantLayer):
            raise UnsupportedModuleError(f"{name or 'the model'} is quantized already; prepare the float model.")
    todo = [(name, model.get_submodule(name), rows) for name, rows in by_layer.items()]
    for name, layer, _ in todo:
        _check_weight(name, layer)
    built = [
        (layer, [_build(method, row, layer) for row in (rows.get("weight"), rows.get("activation"))])
        for _, layer, rows in todo
    ]
    if all(weight is None and act is None for _, (weight, act) in built):
        raise ConfigError(
            "the policy leaves every layer in float: set its bits to 1 to 8, and for a network of one or two layers "
            "first_last='8bit' or 'same'."
        )
    # Nothing has been changed up to here: an error above leaves the float model as it was.
    for layer, (weight, act) in built:
        if weight is not None or act is not None:
            layers.quantize_layer(layer, weight, act)
    replace_float_layers(model)
    for name, quantizer in quantizers(model):
        quantizer.name = name
        quantizer.train(model.training)
    for name, module in model.named_modules():
        if isinstance(module, NoiseSource):
            module.seed(seed, name)
    return model


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight has NaN or infinite values; load sound weights before prepare.")


def _build(method: Method, row: Row | None, layer: nn.Module) -> Quantizer | None:
    if row is None or row.bits == FLOAT_BITS:
        return None
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if row.tensor == "weight":
        axis = layers.weight_channel_axis(layer)
        channels = weight.shape[axis]
    else:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        channels = layers.input_channels(layer)
    try:
        spec = QuantSpec(row.bits, row.levels, axis if row.granularity == "channel" else None)
        grid, rounding = method.grid(row.tensor, spec, channels), method.rounding(row.tensor, spec)
    except ValueError as error:
        raise ConfigError(f"{row.layer}, {row.tensor}: {error}") from None
    if not row.trained:
        grid.requires_grad_(False)
    return Quantizer(spec, grid, rounding).to(weight.device)


def latent_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a prepared model without what its quantizers hold: it loads strictly into the float model.

    These are the latent weights, and whatever else training has changed, such as batch norm's statistics.

    Args:
        model: any model; of a float one it is the whole state dict.

    Returns:
        Tensors by name, which share the model's memory as those of `state_dict` do.
    """
    return layers.without_quantizers(model.state_dict())


def quantizer_table(model: nn.Module) -> str:
    """The quantizers of a prepared model as a table; `auto` grids show what calibration found."""
    rows = []
    kinds: tuple[TensorKind, TensorKind] = ("weight", "activation")
    for name, layer in model.named_modules():
        if not isinstance(layer, layers.QUANTIZABLE):
            continue
        for kind in kinds:
            quantizer = getattr(layer, layers.QUANTIZERS[kind], None)
            if quantizer is None:
                rows.append(Row(name, kind, FLOAT_BITS))
            else:
                spec = quantizer.spec
                granularity: Granularity = "tensor" if spec.channel_axis is None else "channel"
                trained = all(p.requires_grad for p in quantizer.grid.parameters())
                rows.append(Row(name, kind, spec.bits, quantizer.grid.levels, granularity, trained))
    return format_table(rows)


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, quantizer_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: weights, then quantizer parameters without weight decay.

    Args:
        model: a prepared model.
        lr: learning rate of everything but the quantizers.
        weight_decay: of everything but the quantizers.
        quantizer_lr: learning rate of the quantizers; `lr` if not given.
    """
    inside = {id(p) for _, q in quantizers(model) for p in q.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    learned = [p for p in model.parameters() if id(p) in inside]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
    if learned:
        groups.append({"params": learned, "lr": lr if quantizer_lr is None else quantizer_lr, "weight_decay": 0.0})
    return groups
