"""Test accuracy."""

from __future__ import annotations

import itertools

import torch
from lightning_fabric import Fabric
from torch import nn

from qtemper.data.source import Source
from qtemper.modes import eval_mode
from qtemper.train.processes import make_fabric, total


def evaluate(model: nn.Module, source: Source, *, batch_size: int = 500, fabric: Fabric | None = None) -> float:
    """Top-1 accuracy in percent on the test images, in eval mode and float32; the model's mode is kept.

    With several processes each sees its part of the batches.
    """
    fabric = fabric or make_fabric()
    device = next(itertools.chain(model.parameters(), model.buffers())).device  # an integer model has no parameters
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with eval_mode(model), torch.no_grad():
        for images, labels in source.test_batches(batch_size, rank=fabric.global_rank, world_size=fabric.world_size):
            correct += (model(images.to(device)).argmax(dim=1) == labels.to(device)).sum()
    return 100.0 * int(total(correct, fabric)) / source.test_size
