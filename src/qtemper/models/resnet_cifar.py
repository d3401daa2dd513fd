"""ResNet for CIFAR, depth 6n + 2.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
A 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels, a global average, a linear layer.

State-dict keys are those of two public families of checkpoints, so that both load with `strict=True`:

| shortcut | where a stage begins | its parameters | classifier | family |
|---|---|---|---|---|
| `pad`, option A, the paper's | every second pixel, zero channels | none | `linear` | akamaster's |
| `conv`, option B | 1x1 convolution, batch norm | `downsample.0`, `.1` | `fc` | chenyaofo's |

Initialisation of the convolutions: normal of variance 2 / fan-in (He et al., ICCV 2015).
"""

from __future__ import annotations

from typing import Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "conv"]


@final
class PadShortcut(nn.Module):
    """Option A: every second pixel in each direction, and `added // 2` zero channels on either side.

    (N, C, H, W) -> (N, C + added, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """Subsample, then pad."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


@final
class BasicBlock(nn.Module):
    """`relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`, with 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, shortcut: Shortcut) -> None:
        super().__init__()
        stride = 1 if in_channels == channels else 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()  # a module, so that the fast path can replace it
        self.downsample: nn.Module = nn.Identity()
        if stride == 2 and shortcut == "pad":
            self.downsample = PadShortcut(channels - in_channels)
        elif stride == 2:
            project = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(out)) + self.downsample(x))
        return result


@final
class ResNetCifar(nn.Module):
    """He et al.'s ResNet for 32x32 images.

    Args:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56.
        num_classes: outputs.
        shortcut: "pad" or "conv"; see the module's table.
        bn_before_classifier: a BatchNorm1d (`bn2`) after the average, as in EWGS's ResNet-20.
        in_channels: channels of the images.

    Raises:
        ValueError: if `depth` is not 6n + 2, or `shortcut` is unknown.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        *,
        shortcut: Shortcut = "pad",
        bn_before_classifier: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56), got {depth}.")
        if shortcut not in ("pad", "conv"):
            raise ValueError(f"shortcut must be 'pad' or 'conv', got {shortcut!r}.")
        blocks = depth // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, shortcut)
        self.layer2 = _stage(16, 32, blocks, shortcut)
        self.layer3 = _stage(32, 64, blocks, shortcut)
        self.bn2 = nn.BatchNorm1d(64) if bn_before_classifier else nn.Identity()
        # Named after the checkpoints that have this shortcut.
        self.head = "linear" if shortcut == "pad" else "fc"
        self.add_module(self.head, nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.get_submodule(self.head)(self.bn2(out.mean((2, 3))))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    inputs = [in_channels] + [channels] * (blocks - 1)
    return nn.Sequential(*(BasicBlock(width, channels, shortcut) for width in inputs))
