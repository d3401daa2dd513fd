"""`python -m benchmarks.engine`: what `fit` costs over a bare loop with the same network, batches and optimizer.

Both train on the same made-up images in one process, in turns; the figure is the median ratio of CPU time, which other
processes disturb least. The bare loop draws its batches from the same source: what the engine adds is the learning
rate, the check for NaN, the statistics of each step, the progress of noise and scales, and signals.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.training_step.statistics import spread
from torch import nn

import qtemper
from qtemper.data.images import ImageData, Split
from qtemper.data.source import MemorySource
from qtemper.environment import environment
from qtemper.models import ModelConfig, build
from qtemper.train import OptimConfig, TrainConfig, fit

BATCH = 128


def source(steps: int, batch: int = BATCH, device: str = "cpu") -> MemorySource:
    """Random images, as many as an epoch of `steps` needs; a few test images."""

    def split(count: int) -> Split:
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(0, 10, (count,), generator=generator))

    data = ImageData(name="random", classes=tuple("0123456789"), train=split(steps * batch), test=split(8))
    return MemorySource(data.to(device), "half")


def network(method: str, bits: str = "W4A4") -> nn.Module:
    """ResNet-20, float or prepared."""
    torch.manual_seed(0)
    model = build(ModelConfig("resnet20", num_classes=10)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(model, nn.Module)
    if method != "float":
        qtemper.prepare(model, method, bits)
        qtemper.calibrate(model, [torch.randn(32, 3, 32, 32)])
    return model


def bare(model: nn.Module, data: MemorySource) -> None:
    """An epoch with nothing but what training needs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for images, labels in data.train_batches(BATCH, seed=0, epoch=0):
        loss = nn.functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def engine(model: nn.Module, data: MemorySource) -> None:
    """An epoch by `fit`, its evaluation of one small batch included."""
    fit(model, data, TrainConfig(epochs=1, batch_size=BATCH, optim=OptimConfig(lr=0.01), curvature_every=0))


def seconds(function: Callable[[nn.Module, MemorySource], None], model: nn.Module, data: MemorySource) -> float:
    """CPU time of an epoch."""
    started = time.process_time()
    function(model, data)
    return time.process_time() - started


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["float", "lsq", "tempering"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/engine.json"))
    options = parser.parse_args()
    data = source(options.steps)
    found = {}
    for method in options.methods:
        model = network(method)
        seconds(engine, model, data), seconds(bare, model, data)  # not counted: first use
        pairs = [(seconds(engine, model, data), seconds(bare, model, data)) for _ in range(options.rounds)]
        ratio = spread([a / b for a, b in pairs])
        step = spread([b / options.steps for _, b in pairs]).median
        found[method] = {"ratio": ratio.__dict__, "bare_seconds_per_step": step}
        print(
            f"{method}: engine / bare loop {ratio.median:.3f} [{ratio.lower:.3f}, {ratio.upper:.3f}], "
            f"{1e3 * step:.0f} ms a step"
        )
    record = {"environment": environment(0), "rounds": options.rounds, "steps": options.steps, "methods": found}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
