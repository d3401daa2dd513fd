"""A run on its way to a device: its accuracy in integers, and its ONNX file with the proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtemper.config import Experiment
from qtemper.data import Source, open_source
from qtemper.errors import ConfigError
from qtemper.evaluation import load_run
from qtemper.export import integer_model
from qtemper.run import RunDir
from qtemper.train import evaluate

if TYPE_CHECKING:
    from qtemper.export.report import Report

EXAMPLES = 256
"""Calibration images that the 8-bit scales between layers are fitted to, on export."""


def example_batch(experiment: Experiment, source: Source) -> torch.Tensor:
    """Real inputs for export, training images without augmentation."""
    count = EXAMPLES // 8 if experiment.data.name == "imagenet" else EXAMPLES
    return source.calibration_batches(count, 1, seed=experiment.seed)[0]


def _first(images: int, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, labels in batches:
        yield x[:images], labels[:images]
        images -= len(x)
        if images <= 0:
            return


def integer_top1(run: RunDir, data: Path | None = None) -> float:
    """Test accuracy in percent of a run's network as a device computes it.

    Args:
        run: with a final network or a checkpoint.
        data: the data set's directory; the training's own if not given.

    Raises:
        ExportError: integers cannot hold the network.
    """
    experiment, model = load_run(run)
    source = open_source(experiment.data, data or run.data_directory(), "cpu")
    return evaluate(integer_model(model.eval(), example_batch(experiment, source)), source)


def export_run(
    run: RunDir, path: Path, *, target: str = "onnxruntime", data: Path | None = None, images: int | None = None
) -> Report:
    """Write a run's network as ONNX and prove what the file computes; a file that fails is not left behind.

    Args:
        run: with a final network or a checkpoint.
        path: of the ONNX file; the report goes beside it, as `<path>.report.json`.
        target: a name of `qtemper.export.targets.TARGETS`.
        data: the data set's directory.
        images: test images whose top-1 is compared; all if not given.

    Returns:
        The report, a `qtemper.export.report.Report`.

    Raises:
        ConfigError: `images` is below 1.
        ExportError: the target cannot hold the model, or the file is not what the integer model computes.
    """
    from qtemper.export.proof import export_and_verify

    if images is not None and images < 1:
        raise ConfigError(f"--images must be at least 1, got {images}; leave it out for all.")
    experiment, model = load_run(run)
    source = open_source(experiment.data, data or run.data_directory(), "cpu")
    test = source.test_batches(100) if images is None else _first(images, source.test_batches(100))
    return export_and_verify(model, example_batch(experiment, source), path, target=target, test=test)
