"""ResNet-18, 34 and 50 for ImageNet.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1. A 7x7 convolution and a
3x3 maximum, each of stride 2; four stages of blocks with 64, 128, 256 and 512 channels; a global average, a linear
layer.

State-dict keys and maths are those of torchvision's checkpoints, which load with `strict=True`. As there, the
bottleneck of ResNet-50 has its stride in the 3x3 convolution ("v1.5"; the paper has it in the first 1x1).

Initialisation of the convolutions: normal of variance 2 / fan-out (He et al., ICCV 2015), as in torchvision.
"""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@final
class BasicBlock(nn.Module):
    """`relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`, with 3x3 convolutions; `conv1` has the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)
        self.relu = nn.ReLU()  # a module, so that the fast path can replace it

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(out)) + self.downsample(x))
        return result


@final
class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution, the last to `4 * width` channels, added to the shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU()  # a module, so that the fast path can replace it

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        result: Tensor = self.relu(self.bn3(self.conv3(out)) + self.downsample(x))
        return result


@final
class ResNet(nn.Module):
    """He et al.'s ResNet for 224x224 images, or any others of at least 32 pixels a side.

    Args:
        depth: layers with weights: 18, 34 (`BasicBlock`) or 50 (`Bottleneck`).
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: if `depth` is another one.
    """

    def __init__(self, depth: int = 18, num_classes: int = 1000, *, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth must be 18, 34 or 50, got {depth}.")
        block = Bottleneck if depth == 50 else BasicBlock
        one, two, three, four = _BLOCKS[depth]
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, one, stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, two, stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, three, stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, four, stride=2)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(out.mean((2, 3)))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    rest = (block(block.expansion * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(in_channels, width, stride), *rest)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
