"""`python -m benchmarks.gpu_step`: what a step of the CIFAR recipe takes on a CUDA card, and its 400 epochs.

`fit` trains ResNet-20 on made-up images that lie on the card, for every method and way of running it in turn; the
figure is the median of some epochs' milliseconds a step, by the clock on the wall. The first epoch, which compiles, and
the last, which evaluates, are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
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

BATCH, IMAGES, EPOCHS = 256, 50_000, 400
WAYS = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"compile": True, "cuda_graphs": True},
}


def source(steps: int, device: str) -> MemorySource:
    """Random images, as many as an epoch of `steps` needs."""

    def split(count: int) -> Split:
        generator = torch.Generator().manual_seed(count)
        found = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(found, torch.randint(0, 10, (count,), generator=generator))

    data = ImageData("random", split(steps * BATCH), split(8), tuple("0123456789"))
    return MemorySource(data.to(device), "half")


def network(method: str, bits: str) -> nn.Module:
    """ResNet-20, float or prepared."""
    torch.manual_seed(0)
    model = build(ModelConfig("resnet20", num_classes=10))
    if method != "float":
        qtemper.prepare(model, method, bits)
        qtemper.calibrate(model, [torch.randn(32, 3, 32, 32)])
    return model


class Contestant:
    """A training whose epochs are timed one by one."""

    def __init__(self, method: str, way: str, precision: str, bits: str, rounds: int, steps: int, device: str) -> None:
        self.model, self.data = network(method, bits), source(steps, device)
        self.config = TrainConfig(
            epochs=rounds + 2,
            batch_size=BATCH,
            optim=OptimConfig(optimizer="adam", lr=1e-3, quantizer_lr=1e-5),
            precision="bf16" if precision == "bf16" else "float32",
            evaluate_every=0,
            curvature_every=0,
            **WAYS[way],  # type: ignore[arg-type]
        )
        self.steps = steps

    def milliseconds(self) -> tuple[float, list[float]]:
        """Seconds until the first epoch has ended, and milliseconds a step in each later one."""
        started = time.perf_counter()
        history = fit(self.model, self.data, self.config)
        seconds = time.perf_counter() - started
        # The display counts from the first step of this process, so an epoch's own rate is the difference of times.
        ends = [epoch["step"] / epoch["images_per_second"] * BATCH for epoch in history[:-1]]
        return seconds, [1e3 * (b - a) / self.steps for a, b in itertools.pairwise(ends)]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["float", "lsq", "tempering"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["bf16"])
    parser.add_argument("--bits", default="W2A2")
    parser.add_argument("--rounds", type=int, default=5, help="measured epochs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_step.json"))
    chosen = parser.parse_args()
    found = []
    for precision in chosen.precision:
        for method in chosen.methods:
            for way in chosen.ways:
                torch.compiler.reset()
                contestant = Contestant(method, way, precision, chosen.bits, chosen.rounds, chosen.steps, chosen.device)
                entry = {"method": method, "way": way, "precision": precision}
                try:
                    total, rounds = contestant.milliseconds()
                except Exception as error:  # one that fails must not take the others' numbers along
                    print(f"{method} {way} {precision}: {type(error).__name__}: {error}"[:300], flush=True)
                    found.append(entry | {"failure": f"{type(error).__name__}: {error}"[:1000]})
                    continue
                step = spread(rounds)
                minutes = step.median / 1e3 * (IMAGES // BATCH) * EPOCHS / 60
                found.append(entry | {"milliseconds": step.__dict__, "seconds": total, "minutes_400_epochs": minutes})
                print(
                    f"{method:10} {way:9} {precision:8} {step.median:6.2f} [{step.lower:.2f}, {step.upper:.2f}] ms a "
                    f"step, {EPOCHS} epochs in {minutes:.1f} minutes ({total:.0f} s in all here)",
                    flush=True,
                )
                record = {"environment": environment(0), "bits": chosen.bits, "steps": chosen.steps, "found": found}
                chosen.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
