"""What is measured: the network, its batch, the bits and the precision; the same for every contestant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from qtemper.models import ModelConfig, build

FirstLast = Literal["float", "8bit"]
Precision = Literal["float32", "bf16"]

SHAPES: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56"), (128, 32, 10)),
    "resnet18": (16, 224, 1000),
    "mobilenet_v2": (8, 224, 1000),
    "small": (8, 32, 10),
}
"""Batch size, height and width, classes of each network."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FIRST_LAST: tuple[FirstLast, ...] = get_args(FirstLast)


@dataclass(frozen=True)
class Setup:
    """One configuration of the table.

    Attributes:
        arch: network, one of `SHAPES`.
        batch: images of a step; 0 is the network's own (`SHAPES`).
        precision: `float32`, or `bf16`: forward pass and loss under autocast.
        weight: bits of the weights.
        activation: bits of the layers' inputs.
        first_last: bits of the first and the last layer: 8 as in LSQ, the same for all contestants, or float.
        device: `cpu` or `cuda`.
        threads: of torch.
        seed: of weights, batch and noise.
    """

    arch: str = "resnet20"
    batch: int = 0
    precision: Precision = "float32"
    weight: int = 4
    activation: int = 4
    first_last: FirstLast = "8bit"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return self.batch or SHAPES[self.arch][0]

    def title(self) -> str:
        """The setup in a line."""
        size = SHAPES[self.arch][1]
        return (
            f"{self.arch}, {size}x{size}, batch {self.batch_size}, W{self.weight}A{self.activation}, "
            f"first and last {self.first_last}, {self.precision}, {self.device}, {self.threads} threads"
        )

    def network(self) -> nn.Module:
        """The float network in training mode, channels_last."""
        torch.manual_seed(self.seed)
        # The model's literal type would force a second list of names on this file; `build` refuses an unknown one.
        config = ModelConfig(cast(Literal["resnet20"], self.arch), num_classes=SHAPES[self.arch][2])
        model = build(config).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert isinstance(model, nn.Module)
        return model.train()

    def data(self) -> tuple[Tensor, Tensor]:
        """The batch of all steps: images in channels_last, and labels."""
        _, size, classes = SHAPES[self.arch]
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randn(self.batch_size, 3, size, size, generator=generator)
        labels = torch.randint(0, classes, (self.batch_size,), generator=generator)
        return images.contiguous(memory_format=torch.channels_last).to(self.device), labels.to(self.device)
