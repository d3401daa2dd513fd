"""`python -m benchmarks.export`: what exported files are and cost on this CPU; results/export.json.

    python -m benchmarks.export --parts resnet20 resnet18 mobilenet --data ../shared/data [--runs RUN ...]

- resnet20: trained runs (`--runs`), and W8A8 calibrated from the public float checkpoint: the full CIFAR-10 test set.
- resnet18: W8A8, W4A4 and W2A2 with random weights at 224x224: sizes, and latency against float in onnxruntime.
- mobilenet: MobileNetV1 with the public float weights, calibrated to W8A8 and W4A8, on 100 of the 1,000 images.

Latency is only worth reading from an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qtemper
from qtemper.data import DataConfig, Source, open_source
from qtemper.deploy import example_batch
from qtemper.environment import environment
from qtemper.evaluation import load_run
from qtemper.export.proof import export_and_verify
from qtemper.models import ModelConfig, build
from qtemper.policy import BitPolicy
from qtemper.run import RunDir
from qtemper.weights import read_safetensors

RESNET20 = "weights/cifar10_resnet20_akamaster-12fca82f.safetensors"
MOBILENET = "weights/mobilenet_v1_1.0_224.safetensors"


class Case(NamedTuple):
    """A model to export, a batch of real inputs, images with labels, and rounds of timing."""

    name: str
    model: nn.Module
    example: Tensor
    test: Iterable[tuple[Tensor, Tensor]] = ()
    rounds: int = 30


def measure(case: Case, target: str) -> dict[str, Any]:
    """Export, verify and time one model."""
    with tempfile.TemporaryDirectory() as folder:
        report = export_and_verify(
            case.model,
            case.example,
            Path(folder) / "model.onnx",
            target=target,
            test=case.test,
            rounds=case.rounds,
        )
    print(f"--- {case.name}\n{report.table()}", flush=True)
    record = json.loads(report.to_json())
    record["counts"] = [c for c in record["counts"] if c["wrong"]]  # what is not here, is equal
    own = [c for c in report.counts if (c.runtime, c.inputs) == ("onnxruntime", "whole model") and not c.real]
    record["codes"] = sum(c.codes for c in own)
    return {"model": case.name, **record}


def calibrated(config: ModelConfig, weights: Path | None, policy: BitPolicy, batches: list[Tensor]) -> nn.Module:
    """A float network, prepared and calibrated; random weights if there are none."""
    torch.manual_seed(0)
    model = build(config)
    if weights is not None:
        model.load_state_dict(read_safetensors(weights))
    qtemper.prepare(model, "lsq", policy)
    return qtemper.calibrate(model, batches, batch_norm=weights is None).eval()


def resnet20(data: Path, runs: list[Path], images: int | None) -> Iterator[Case]:
    """Trained runs, and W8A8."""
    source = open_source(DataConfig(normalization="imagenet"), data / "cifar10", "cpu")
    batches = source.calibration_batches(256, 4, seed=0)
    model = calibrated(ModelConfig(), data / RESNET20, BitPolicy(8, 8, "8bit"), batches)
    yield Case("resnet20 W8A8, calibrated", model, batches[0], some(source, images))
    for path in runs:
        experiment, model = load_run(RunDir.open(path))
        source = open_source(experiment.data, data / "cifar10", "cpu")
        name = f"resnet20 W{experiment.policy.weight}A{experiment.policy.activation}, {experiment.train.epochs} epochs"
        yield Case(name, model, example_batch(experiment, source), some(source, images))


def some(source: Source, images: int | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Test batches, so many images of them."""
    return itertools.islice(source.test_batches(100), None if images is None else max(1, images // 100))


def resnet18(rounds: int) -> Iterator[Case]:
    """Random weights: what a file takes and how fast it is does not depend on them."""
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    config = ModelConfig("resnet18", 1000)
    for bits in (8, 4, 2):
        model = calibrated(config, None, BitPolicy(bits, bits, "8bit"), [x])
        yield Case(f"resnet18 W{bits}A{bits}", model, x, rounds=rounds)


def mobilenet(data: Path, images: int) -> Iterator[Case]:
    """Public float weights and real images, which also calibrate it."""
    config = DataConfig("imagenet", normalization="half", workers=0)
    source = open_source(config, data / "imagenet" / "nips2017", "cpu")
    test = list(itertools.islice(source.test_batches(20), max(1, images // 20)))
    batches = [x for x, _ in test[:2]]
    for bits in ((8, 8), (4, 8)):
        model = calibrated(ModelConfig("mobilenet_v1", 1000), data / MOBILENET, BitPolicy(*bits, "8bit"), batches)
        yield Case(f"mobilenet_v1 W{bits[0]}A{bits[1]}, calibrated", model, batches[0], test, rounds=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["resnet20", "resnet18", "mobilenet"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument("--images", type=int)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/export.json"))
    given = parser.parse_args()
    parts = {
        "resnet20": lambda: resnet20(given.data, given.runs, given.images),
        "resnet18": lambda: resnet18(given.rounds),
        "mobilenet": lambda: mobilenet(given.data, given.images or 100),
    }
    document: dict[str, Any] = {"environment": environment(0), "models": []}
    for part in given.parts:
        for case in parts[part]():
            document["models"].append(measure(case, given.target))
            given.out.write_text(json.dumps(document, indent=1) + "\n")  # after each: a cut run keeps what it has


if __name__ == "__main__":
    main()
