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
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine import network, source
from benchmarks.training_step.statistics import Spread, spread

from qtemper.environment import environment
from qtemper.train import OptimConfig, TrainConfig, fit

BATCH, IMAGES, EPOCHS = 256, 50_000, 400
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"compile": True, "cuda_graphs": True},
}


def milliseconds(method: str, way: str, precision: Any, chosen: argparse.Namespace) -> Spread:
    """Of a step, over the measured epochs."""
    torch.compiler.reset()
    config = TrainConfig(
        epochs=chosen.rounds + 2,
        batch_size=BATCH,
        optim=OptimConfig(optimizer="adam", lr=1e-3, quantizer_lr=1e-5),
        precision=precision,
        evaluate_every=0,
        curvature_every=0,
        **WAYS[way],
    )
    history = fit(network(method, chosen.bits), source(chosen.steps, BATCH, chosen.device), config)
    # An epoch's rate counts from the first step on, so its own time is a difference.
    ends = [epoch["step"] / epoch["images_per_second"] * BATCH for epoch in history[:-1]]
    return spread([1e3 * (end - start) / chosen.steps for start, end in itertools.pairwise(ends)])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["float", "lsq", "tempering"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["bf16"])
    parser.add_argument("--bits", default="W2A2")
    parser.add_argument("--rounds", type=int, default=5, help="measured epochs")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_step.json"))
    chosen = parser.parse_args(arguments)
    found = []
    for precision, method, way in itertools.product(chosen.precision, chosen.methods, chosen.ways):
        entry: dict[str, Any] = {"method": method, "way": way, "precision": precision}
        try:
            step = milliseconds(method, way, precision, chosen)
            minutes = step.median / 1e3 * (IMAGES // BATCH) * EPOCHS / 60
            entry |= {"milliseconds": step.__dict__, "minutes_400_epochs": minutes}
            text = f"{step} ms a step, {EPOCHS} epochs in {minutes:.1f} minutes"
        except Exception as error:  # one that fails must not take the others' numbers along
            text = entry["failure"] = f"{type(error).__name__}: {error}"[:1000]
        print(f"{method:10} {way:9} {precision:8} {text}", flush=True)
        found.append(entry)
        record = {"environment": environment(0), "bits": chosen.bits, "steps": chosen.steps, "found": found}
        chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
