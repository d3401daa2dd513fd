"""Float networks to quantize: one interface, `build(config)`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qtemper.errors import nearest
from qtemper.models.resnet_cifar import ResNetCifar
from qtemper.models.small import SmallConvNet

__all__ = ["ModelConfig", "ResNetCifar", "SmallConvNet", "build"]

_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        arch: `resnet20` .. `resnet56` are `ResNetCifar`, `small` is `SmallConvNet`.
        num_classes: outputs.
        shortcut: ResNets only: "pad" or "conv"; a float checkpoint needs its own.
        bn_before_classifier: ResNets only: a batch norm before the classifier, as in EWGS.
        in_channels: channels of the images.
    """

    arch: Literal["resnet20", "resnet32", "resnet44", "resnet56", "small"] = "resnet20"
    num_classes: int = 10
    shortcut: Literal["pad", "conv"] = "pad"
    bn_before_classifier: bool = False
    in_channels: int = 3


def build(config: ModelConfig) -> nn.Module:
    """A freshly initialised float network; seed torch's generator before.

    Raises:
        ValueError: if `config.arch` or `config.shortcut` is unknown, with the nearest known name.
    """
    if config.arch == "small":
        if config.shortcut != "pad" or config.bn_before_classifier:
            warnings.warn("shortcut and bn_before_classifier have no effect on arch 'small'.", stacklevel=2)
        return SmallConvNet(config.num_classes, config.in_channels)
    if config.arch not in _DEPTHS:
        raise ValueError(f"unknown arch {config.arch!r}; {nearest(config.arch, [*_DEPTHS, 'small'])}")
    return ResNetCifar(
        _DEPTHS[config.arch],
        config.num_classes,
        shortcut=config.shortcut,
        bn_before_classifier=config.bn_before_classifier,
        in_channels=config.in_channels,
    )
