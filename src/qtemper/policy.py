"""Which tensor gets which quantizer: a `BitPolicy`, applied to a model, gives a `Plan` to print and edit."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from qtemper import layers
from qtemper.errors import ConfigError, UnsupportedModuleError, check_choices, nearest
from qtemper.functional import Levels
from qtemper.methods import get_method
from qtemper.quantizer import Method, QuantSpec, TensorKind

FLOAT_BITS = 32
"""The bit width that means: leave this tensor in float."""

Granularity = Literal["tensor", "channel"]


@dataclass(frozen=True)
class Rule:
    """Overrides for the layers whose name matches; a field that is None keeps what earlier rules said.

    Attributes:
        pattern: shell-style wildcard for the layer's name, e.g. `layer1.*.conv2`, `*downsample*`.
        weight: bits of the weight, 1 to 8, or 32 for float.
        activation: bits of the input, 1 to 8, or 32 for float.
        weight_levels: kind of grid of the weight: `signed` (zero point 0, what others call symmetric) or `symmetric`
            (mid-rise: as many levels on either side and none at 0); see `functional.code_range`.
        activation_levels: kind of grid of the input; `unsigned`, too.
        weight_granularity: one scale per `tensor` or per output `channel` (of a grouped transposed convolution per
            index of the weight's second dimension, which the groups share).
        activation_granularity: one scale per `tensor` or per input `channel`.
        train_input: whether the scale of the input is trained, or stays as calibrated.
    """

    pattern: str
    weight: int | None = None
    activation: int | None = None
    weight_levels: Literal["signed", "symmetric", "auto"] | None = None
    activation_levels: Levels | Literal["auto"] | None = None
    weight_granularity: Granularity | None = None
    activation_granularity: Granularity | None = None
    train_input: bool | None = None

    def __post_init__(self) -> None:
        check_choices(self, f"Rule({self.pattern!r})")
        if all(getattr(self, field.name) is None for field in dataclasses.fields(self) if field.name != "pattern"):
            raise ConfigError(
                f"Rule({self.pattern!r}) changes nothing; give it bits, as in Rule({self.pattern!r}, weight=8)."
            )


@dataclass(frozen=True)
class BitPolicy:
    """Bits for every layer: defaults, a preset for the first and last layer, then ordered rules (later wins).

    First and last are meant in the order in which the layers are registered in the model.

    Attributes:
        weight: bits of the weights, 1 to 8, or 32 for float.
        activation: bits of the layers' inputs, 1 to 8, or 32 for float.
        first_last: `float` (as DoReFa, EWGS), `8bit` (as LSQ; the scale of the network's own input then stays as
            calibrated, see `Rule.train_input`) or `same` as the rest.
        rules: overrides, applied in order.
    """

    weight: int = 4
    activation: int = 4
    first_last: Literal["float", "8bit", "same"] = "float"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)

    @classmethod
    def parse(cls, text: str) -> BitPolicy:
        """A policy from the field's shorthand: `W4A4`, `w1a32`.

        Raises:
            ConfigError: if the text does not have that form.
        """
        match = re.fullmatch(r"[wW](\d+)[aA](\d+)", text)
        if not match:
            raise ConfigError(f"cannot read {text!r} as a bit policy; write it like 'W4A4' or 'W1A32'.")
        return cls(weight=int(match[1]), activation=int(match[2]))

    def at(self, text: str) -> BitPolicy:
        """This policy at other bits: `W3` changes the weights, `W3A8` both; first and last layer and rules stay.

        Raises:
            ConfigError: if the text has neither form.
        """
        match = re.fullmatch(r"[wW](\d+)(?:[aA](\d+))?", text)
        if not match:
            raise ConfigError(f"cannot read {text!r} as bits; write W3 for the weights, or W3A8 for both.")
        return replace(self, weight=int(match[1]), activation=int(match[2] or self.activation))


@dataclass(frozen=True)
class Row:
    """One line of a `Plan`: one tensor of one layer.

    Attributes:
        layer: name of the layer in the model.
        tensor: `weight` or `activation` (the layer's input).
        bits: 1 to 8, or 32 for float.
        levels: kind of grid; `auto` is settled at calibration.
        granularity: one scale per `tensor` or per `channel`.
        trained: whether what the grid learns is trained, or stays as calibrated.
    """

    layer: str
    tensor: TensorKind
    bits: int
    levels: Levels | Literal["auto"] = "auto"
    granularity: Granularity = "tensor"
    trained: bool = True

    def __post_init__(self) -> None:
        check_choices(self, f"{self.layer}, {self.tensor}")
        if self.tensor == "weight" and self.levels == "unsigned":
            raise ConfigError(
                f"{self.layer}, weight: levels must be 'signed' or 'symmetric'; weights have either sign."
            )


class Plan:
    """The table of every quantizer that `prepare` will make: print it, edit it, pass it on.

    >>> plan = make_plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), BitPolicy(first_last="same"))
    >>> plan.set("0", "weight", bits=8)
    >>> plan["0", "weight"].bits
    8
    """

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(row.layer, row.tensor): row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[str, TensorKind]) -> Row:
        if key not in self._rows:
            names = [f"{layer}, {tensor}" for layer, tensor in self._rows]
            raise ConfigError(f"no row {key[0]}, {key[1]}; {nearest(f'{key[0]}, {key[1]}', names)}")
        return self._rows[key]

    def set(self, layer: str, tensor: TensorKind, **changes: Any) -> None:
        """Change fields of one row.

        Raises:
            ConfigError: there is no such row or field, or the value is none of the field's.
        """
        fields = [field.name for field in dataclasses.fields(Row)]
        for name in changes:
            if name not in fields:
                raise ConfigError(f"a row of the plan has no {name!r}; {nearest(name, fields)}")
        self._rows[layer, tensor] = replace(self[layer, tensor], **changes)

    def __str__(self) -> str:
        return format_table(list(self))


def format_table(rows: list[Row]) -> str:
    """Rows as an aligned text table."""
    head = ("layer", "tensor", "bits", "levels", "scale per")
    cells = [
        (r.layer or "(model)", r.tensor, "float" if r.bits == FLOAT_BITS else str(r.bits),
         "-" if r.bits == FLOAT_BITS else r.levels,
         "-" if r.bits == FLOAT_BITS else r.granularity + ("" if r.trained else ", fixed"))
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *cells]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


# Modules that hold weights but apply them by themselves: swapping their children would silently do nothing.
_REFUSED: dict[type[Any], str] = {
    nn.RNNBase: "its weights are applied inside a fused kernel; write the recurrence with nn.Linear",
    nn.RNNCellBase: "its weights are applied inside a fused kernel; write the cell with nn.Linear",
    nn.MultiheadAttention: "it applies its projections itself; use an attention written with nn.Linear",
    nn.TransformerEncoderLayer: "its fused inference path goes past the quantizers; write the block with nn.Linear",
    nn.Bilinear: "there is no quantized bilinear form; write it with nn.Linear",
    nn.modules.lazy.LazyModuleMixin: "its weights do not exist yet; run one batch through the model first",
}


def make_plan(model: nn.Module, policy: BitPolicy | str, method: Method | str | None = None) -> Plan:
    """Apply a policy to a model.

    Args:
        model: the float model.
        policy: a `BitPolicy` or shorthand such as "W4A4".
        method: a method or its name; decides the kind of grid where the policy does not (EWGS's weights are symmetric,
            for instance).

    Raises:
        UnsupportedModuleError: a module cannot be quantized; the message names it and the way out.
        ConfigError: a rule matches no layer; bits out of range.
    """
    policy = BitPolicy.parse(policy) if isinstance(policy, str) else policy
    if not isinstance(policy, BitPolicy):
        raise ConfigError(f"policy must be text such as 'W4A4', a BitPolicy or a Plan, got {policy!r:.80}.")
    method = get_method(method) if isinstance(method, str) else method
    names = [name for name, module in model.named_modules() if isinstance(module, layers.QUANTIZABLE)]
    refused = {name: why for name, module in model.named_modules() if (why := _refusal(module))}
    _check_rules(policy, [*names, *refused])
    for name, why in refused.items():
        weight, activation = _bits(policy, name, ends=set())
        if (weight, activation) != (FLOAT_BITS, FLOAT_BITS):
            module = model.get_submodule(name)
            keep = f", or keep it in float with Rule({name!r}, weight=32, activation=32)"
            raise UnsupportedModuleError(
                f"{name or 'the model itself'} ({type(module).__name__}) cannot be quantized: {why}"
                f"{'' if isinstance(module, layers.QuantLayer) else keep}."
            )
    # Layers inside a refused module stay in float with it.
    names = [n for n in names if not any(n == r or n.startswith(r + ".") for r in refused if r)]
    if not names:
        kinds = ", ".join(cls.__name__ for cls in layers.QUANTIZABLE)
        raise UnsupportedModuleError(f"the model has no layer that can be quantized (one of {kinds}).")
    return Plan([row for name in names for row in _rows(policy, method, name, names[0], names[-1])])


def _bits(policy: BitPolicy, name: str, ends: set[str]) -> tuple[int, int]:
    weight, activation = policy.weight, policy.activation
    if name in ends and policy.first_last != "same":
        preset = FLOAT_BITS if policy.first_last == "float" else 8
        weight, activation = (
            preset if bits != FLOAT_BITS or preset == FLOAT_BITS else bits for bits in (weight, activation)
        )
    for rule in _matching(policy, name):
        weight = rule.weight if rule.weight is not None else weight
        activation = rule.activation if rule.activation is not None else activation
    return weight, activation


def _rows(policy: BitPolicy, method: Method | None, name: str, first: str, last: str) -> list[Row]:
    rows = []
    all_bits = _bits(policy, name, ends={first, last})
    # The range of pixels is known, 8 bits hold it, and a gradient for its scale would cost the first convolution's
    # whole backward pass to its input: a tenth of ResNet-18's step (docs/performance.md).
    train_input = not (name == first and policy.first_last == "8bit" and all_bits[1] == 8)
    for rule in _matching(policy, name):
        train_input = rule.train_input if rule.train_input is not None else train_input
    kinds: tuple[TensorKind, TensorKind] = ("weight", "activation")
    for kind, bits in zip(kinds, all_bits, strict=True):
        levels = method.default_levels(kind) if method else "auto"
        granularity: Granularity = "tensor"
        for rule in _matching(policy, name):
            levels = getattr(rule, f"{kind}_levels") or levels
            granularity = getattr(rule, f"{kind}_granularity") or granularity
        if bits != FLOAT_BITS:
            try:
                QuantSpec(bits, levels)
            except ValueError as error:
                raise ConfigError(f"{name}, {kind}: {error}") from None
        rows.append(Row(name, kind, bits, levels, granularity, trained=kind == "weight" or train_input))
    return rows


def _matching(policy: BitPolicy, name: str) -> list[Rule]:
    return [rule for rule in policy.rules if fnmatch.fnmatchcase(name, rule.pattern)]


def _check_rules(policy: BitPolicy, names: list[str]) -> None:
    for rule in policy.rules:
        if not any(fnmatch.fnmatchcase(name, rule.pattern) for name in names):
            raise ConfigError(f"rule {rule.pattern!r} matches no layer; {nearest(rule.pattern, names)}")


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot be quantized, or None."""
    for cls, why in _REFUSED.items():
        if isinstance(module, cls):
            return why
    if isinstance(module, layers.QUANTIZABLE):
        if isinstance(module, layers.QuantLayer):
            return "it is quantized already; prepare the float model"
        if parametrize.is_parametrized(module, "weight"):
            return "its weight is parametrized; call parametrize.remove_parametrizations(layer, 'weight') first"
        if any("weight_g" in key or "weight_orig" in key for key in module._parameters):
            return "its weight is recomputed by a hook (weight_norm, spectral_norm or pruning); remove that first"
    return None
