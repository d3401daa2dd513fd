"""A training of a fraction of a second: 48 image files of 16x16 pixels, for faults that are tried hundreds of times.

The float network comes from a file, so that a trial is quantized training alone.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.faults.driver import Trial, digest, scratch
from benchmarks.faults.events import FileEvents
from benchmarks.faults.groups import Group, curve, worst
from PIL import Image

from qtemper.models import ModelConfig, build
from qtemper.weights import read_safetensors, save_tensors

CLASSES, PER_CLASS = ("a", "b", "c"), {"train": 16, "val": 4}
EPOCHS, STEPS, OPTIMIZERS = 3, 4, 2
"""Epochs, steps of each, and optimizers in each step: the quantizers have their own."""

SETTINGS = (
    "model.arch=small",
    "model.num_classes=3",
    "data.image_size=16",
    "data.workers=0",
    "calibration.batches=1",
    "calibration.batch_size=12",
    f"train.epochs={EPOCHS}",
    "train.batch_size=12",
    "train.log_every=1",
    "train.curvature_every=0",
    "train.timeout=60",
)


@functools.cache
def folder() -> Path:
    """The images and `float.safetensors`; removed when the program ends."""
    root = Path(tempfile.mkdtemp(prefix="faults-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_images(root)
    torch.manual_seed(0)
    model = build(ModelConfig("small", num_classes=len(CLASSES), in_channels=3))
    save_tensors(root / "float.safetensors", dict(model.state_dict()), {})
    return root


def write_images(root: Path) -> None:
    """`root/train` and `root/val`: noise, brighter from class to class."""
    draw = np.random.default_rng(0)
    for part, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (16, 16, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{number:02}.png")


def tiny(run: Path, *settings: str, resume: bool = False, data: Path | None = None) -> list[str]:
    """Arguments of `qtemper` for this training into `run`."""
    assignments = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    source = ["--data", str(data or folder()), "--init", str(folder() / "float.safetensors")]
    words = ["train", "imagenet-resnet18-w4a4-tempering", *source, "--out", str(run), *assignments]
    return [*words, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class End:
    """How an uninterrupted run ended.

    Attributes:
        digest: sha256 of the final weights' file.
        weights: sha256 of the tensors in it alone; the file holds the settings, too.
        curve: all lines of `metrics.jsonl`.
        events: the first rank's file events; the other ranks have none.
    """

    digest: str
    weights: str
    curve: list[dict[str, object]]
    events: tuple[str, ...]


def weights(run: Path) -> str:
    """sha256 of the final weights, whatever the settings beside them."""
    tensors = read_safetensors(run / "final.safetensors")
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + tensors[name].numpy().tobytes())
    return hashed.hexdigest()


@functools.cache
def reference(size: int, *settings: str) -> End:
    """The uninterrupted run of `size` processes."""
    with scratch() as place:
        run, logs = place / "run", [place / f"events-{rank}" for rank in range(size)]

        def watch(rank: int) -> None:
            FileEvents(run, log=logs[rank]).install()

        trial = worst(Group(tiny(run, *settings), watch, size=size).wait())
        assert trial.code == 0, trial.err
        first, *others = (tuple(log.read_text().splitlines()) for log in logs)
        assert not any(others), f"a rank other than the first writes files: {others}"
        found = digest(run)
        assert found is not None
        return End(found, weights(run), curve(run), first)


def go_on(
    run: Path, size: int, *settings: str, before: Callable[[int], object] | None = None, data: Path | None = None
) -> Trial:
    """What a user does after a crash: `--resume`, or the plain command where the run had not begun."""
    arguments = tiny(run, *settings, resume=(run / "config.json").exists(), data=data)
    return worst(Group(arguments, before, size=size).wait())


def same_end(run: Path, trial: Trial, size: int, *settings: str) -> str | None:
    """What is different from the uninterrupted run, or None."""
    if trial.code != 0:
        return f"resuming ended with {trial.code}: {trial.err.strip()[-300:]}"
    expected = reference(size, *settings)
    if digest(run) != expected.digest:
        return "the final weights differ"
    return None if curve(run) == expected.curve else "metrics.jsonl differs"
