"""Float networks to quantize: one interface, `build(config)`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qtemper.errors import closest
from qtemper.models.mobilenet import LAYOUTS, MobileNetV1, MobileNetV2
from qtemper.models.resnet import ResNet
from qtemper.models.resnet_cifar import ResNetCifar
from qtemper.models.small import SmallConvNet

__all__ = ["MobileNetV1", "MobileNetV2", "ModelConfig", "ResNet", "ResNetCifar", "SmallConvNet", "build"]

_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}
_IMAGENET_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50}


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        arch: `resnet20` .. `resnet56` are `ResNetCifar`, `small` is `SmallConvNet`; for ImageNet `resnet18`,
            `resnet34` and `resnet50` are `ResNet`, `mobilenet_v1` and `mobilenet_v2` what they say;
            `mobilenet_v2_cifar` and the smaller `mobilenet_v2_reduced` are for images of 32x32 and less.
        num_classes: outputs.
        shortcut: `ResNetCifar` only: "pad" or "conv"; a float checkpoint needs its own.
        bn_before_classifier: `ResNetCifar` only: a batch norm before the classifier, as in EWGS.
        in_channels: channels of the images.
    """

    arch: Literal[
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "small",
        "resnet18",
        "resnet34",
        "resnet50",
        "mobilenet_v1",
        "mobilenet_v2",
        "mobilenet_v2_cifar",
        "mobilenet_v2_reduced",
    ] = "resnet20"
    num_classes: int = 10
    shortcut: Literal["pad", "conv"] = "pad"
    bn_before_classifier: bool = False
    in_channels: int = 3


def build(config: ModelConfig) -> nn.Module:
    """A freshly initialised float network; seed torch's generator before.

    Raises:
        ValueError: if `config.arch` or `config.shortcut` is unknown, with the nearest known name.
    """
    if config.arch not in _DEPTHS:
        if config.shortcut != "pad" or config.bn_before_classifier:
            warnings.warn(f"shortcut and bn_before_classifier have no effect on arch {config.arch!r}.", stacklevel=2)
        return _build_other(config)
    return ResNetCifar(
        _DEPTHS[config.arch],
        config.num_classes,
        shortcut=config.shortcut,
        bn_before_classifier=config.bn_before_classifier,
        in_channels=config.in_channels,
    )


def _build_other(config: ModelConfig) -> nn.Module:
    if config.arch == "small":
        return SmallConvNet(config.num_classes, config.in_channels)
    if config.arch in _IMAGENET_DEPTHS:
        return ResNet(_IMAGENET_DEPTHS[config.arch], config.num_classes, in_channels=config.in_channels)
    if config.arch == "mobilenet_v1":
        return MobileNetV1(config.num_classes, in_channels=config.in_channels)
    if config.arch in LAYOUTS:
        return MobileNetV2(config.num_classes, in_channels=config.in_channels, layout=LAYOUTS[config.arch])
    raise ValueError(f"unknown arch {config.arch!r}; {_nearest_arch(config.arch)}")


def _nearest_arch(name: str) -> str:
    small = [*_DEPTHS, "small", "mobilenet_v2_cifar", "mobilenet_v2_reduced"]
    large = [*_IMAGENET_DEPTHS, "mobilenet_v1", "mobilenet_v2"]
    close = closest(name, [*small, *large])
    return f"did you mean {close!r}?" if close else f"known: {', '.join(small)}; for ImageNet {', '.join(large)}."
