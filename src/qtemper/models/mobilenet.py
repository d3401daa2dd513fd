"""MobileNetV1 and MobileNetV2 for ImageNet, and V2 for small images: depthwise-separable convolutions, ReLU6.

| network | paper | keys and maths of |
|---|---|---|
| V1 | Howard et al., "MobileNets", arXiv 1704.04861, table 1 | Google's checkpoint: `layers.N.conv1`, `linear` |
| V2 | Sandler et al., "MobileNetV2", CVPR 2018, table 2 | torchvision's: `features.N`, `classifier.1` |

Both load with `strict=True`. V1 differs from V2 in what its checkpoint was trained with: batch norm has eps 1e-3, and
a stride-2 convolution pads right and bottom alone, as TensorFlow's SAME does for images with even sides. `LAYOUTS` has
V2's forms for images of 32x32 and less.

Initialisation: convolutions normal of variance 2 / fan-out (He et al., ICCV 2015), the classifier normal of standard
deviation 0.01, as in torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

_V1_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
"""Output channels and stride of each depthwise-separable block."""


@final
@dataclass(frozen=True)
class Layout:
    """A MobileNetV2's numbers.

    Attributes:
        stem: output channels and stride of the first convolution.
        stages: expansion, output channels, number of blocks and stride of the first: the paper's t, c, n, s.
        head: channels of the last convolution.
    """

    stem: tuple[int, int]
    stages: tuple[tuple[int, int, int, int], ...]
    head: int


LAYOUTS = {
    "mobilenet_v2": Layout(
        (32, 2),
        (
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ),
        1280,
    ),
    # Small images: the first two of the five strides are 1, so that 32 pixels end as 4, as 128 do above.
    "mobilenet_v2_cifar": Layout(
        (32, 1),
        (
            *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ),
        1280,
    ),
    "mobilenet_v2_reduced": Layout((16, 1), ((1, 16, 1, 1), (3, 24, 2, 2), (3, 32, 2, 1), (6, 64, 2, 2)), 256),
}
"""By name: the paper's table 2; the same for 32x32 images; and, as our reading of PQDE's "reduced MobileNetV2" (its
numbers are not public), seven blocks instead of 17, at most 64 channels, expansion 3 where images are large."""


@final
class SameConv2d(nn.Conv2d):
    """3x3 convolution that pads like TensorFlow's SAME, for inputs with even sides.

    Stride 1 pads by one on every side, stride 2 on the right and at the bottom alone. The zeros come after the input's
    quantizer, as those of `nn.Conv2d` do: a grid without a level at 0 leaves them alone.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=2 - stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Pad, then convolve."""
        return super().forward(F.pad(input, (0, 1, 0, 1)) if self.stride == (2, 2) else input)


@final
class SeparableBlock(nn.Module):
    """V1's: 3x3 depthwise, then 1x1 convolution, each with batch norm and ReLU6."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = SameConv2d(in_channels, in_channels, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels, eps=1e-3)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        out = F.relu6(self.bn1(self.conv1(x)))
        return F.relu6(self.bn2(self.conv2(out)))


@final
class MobileNetV1(nn.Module):
    """Howard et al.'s MobileNet of width 1.0, for 224x224 images or any others whose sides divide by 32.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int = 1000, *, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = SameConv2d(in_channels, 32, 2)
        self.bn1 = nn.BatchNorm2d(32, eps=1e-3)
        inputs = [32] + [channels for channels, _ in _V1_BLOCKS[:-1]]
        self.layers = nn.Sequential(
            *(SeparableBlock(width, *block) for width, block in zip(inputs, _V1_BLOCKS, strict=True))
        )
        self.linear = nn.Linear(1024, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        out = self.layers(F.relu6(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@final
class InvertedResidual(nn.Module):
    """V2's: 1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 without ReLU; added to `x` where shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(in_channels, hidden, 1)]
        layers += [_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


@final
class MobileNetV2(nn.Module):
    """Sandler et al.'s MobileNetV2 of width 1.0, for 224x224 images or any others of at least 32 pixels a side.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        layout: its numbers; those for small images take any of at least 8 pixels a side.
        dropout: probability in front of the classifier. torchvision trains with 0.2. Here it is off unless asked for:
            it draws from torch's generator, so that a run with it depends on how samples are split among processes.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        dropout: float = 0.0,
        layout: Layout = LAYOUTS["mobilenet_v2"],
    ) -> None:
        super().__init__()
        width, stride = layout.stem
        blocks: list[nn.Module] = [_conv_bn_relu6(in_channels, width, 3, stride)]
        for expansion, channels, count, stride in layout.stages:
            for i in range(count):
                blocks.append(InvertedResidual(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        self.features = nn.Sequential(*blocks, _conv_bn_relu6(width, layout.head, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(layout.head, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def _conv_bn_relu6(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
