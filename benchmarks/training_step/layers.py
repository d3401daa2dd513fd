"""What textbook LSQ and the peers share: which layers get which bits, what they see, and a quantized layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.training_step.setup import Setup
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A layer to quantize.

    Attributes:
        name: of the layer in the model.
        layer: the float layer.
        weight: bits of its weight.
        activation: bits of its input.
        signed: whether its input has negative values.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    weight: int
    activation: int
    signed: bool

    def weight_codes(self) -> tuple[int, int]:
        """Least and largest integer of the weight."""
        return -(2 ** (self.weight - 1)), 2 ** (self.weight - 1) - 1

    def input_codes(self) -> tuple[int, int]:
        """Least and largest integer of the input."""
        if self.signed:
            return -(2 ** (self.activation - 1)), 2 ** (self.activation - 1) - 1
        return 0, 2**self.activation - 1


def sites(model: nn.Module, setup: Setup, images: Tensor) -> list[Site]:
    """Every convolution and linear layer but those that the setup leaves in float."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    lowest = dict(inputs(model, images))
    chosen = []
    for index, (name, layer) in enumerate(found):
        edge = index in (0, len(found) - 1)
        if edge and setup.first_last == "float":
            continue
        weight, activation = (8, 8) if edge else (setup.weight, setup.activation)
        chosen.append(Site(name, layer, weight, activation, signed=bool(lowest[name].min() < 0)))
    return chosen


def inputs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What every convolution and linear layer is given in one forward pass, by the layer's name."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]

        return hook

    hooks = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    yield from seen.items()


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with a quantizer on its weight and one on its input."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight_quantizer, self.input_quantizer = layer, weight, activation

    def forward(self, x: Tensor) -> Tensor:
        """Quantize both, then the layer's own arithmetic."""
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            out: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
            return out
        return F.linear(x, weight, self.layer.bias)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
