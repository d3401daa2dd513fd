"""What is not quantized and was in a compiler's way: the float layers that have a faster form here."""

from __future__ import annotations

from torch import nn

from qtemper.fast.norm import BatchNorm2d
from qtemper.fast.pooling import MaxPool2d
from qtemper.fast.relu import ReLU

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
    nn.ReLU: ReLU,
}
"""Float layers and the subclasses that they become; users' own subclasses stay as they are."""


def replace_float_layers(model: nn.Module) -> None:
    """Turn a model's float layers, in place, into those of `REPLACEMENTS`."""
    for module in model.modules():
        if type(module) in REPLACEMENTS:
            module.__class__ = REPLACEMENTS[type(module)]
