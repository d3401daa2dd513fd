"""Data sets for image classification: one interface, `load(config, root)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtemper.data.cifar import load_cifar, load_cifar_hub
from qtemper.data.digits import load_digits
from qtemper.data.images import (
    NORMALIZATIONS,
    DataError,
    ImageData,
    Split,
    augment,
    epoch_order,
    normalize,
    test_batches,
    train_batches,
)
from qtemper.errors import nearest

__all__ = [
    "NORMALIZATIONS",
    "DataConfig",
    "DataError",
    "ImageData",
    "Split",
    "augment",
    "epoch_order",
    "load",
    "load_cifar",
    "load_cifar_hub",
    "load_digits",
    "normalize",
    "test_batches",
    "train_batches",
]


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and what happens to them before the model.

    Attributes:
        name: the data set.
        source: where it comes from: "folder" (CIFAR, below `--data DIR`), "hub" (CIFAR, Hugging Face) or
            "embedded" (digits, which come with scikit-learn).
        normalization: key of `NORMALIZATIONS`; a float checkpoint needs the one that it was trained with.
        padding: black border of the random crop in training, in pixels.
        flip: whether training images are mirrored at random; not for digits, where it changes the meaning.

    Raises:
        ValueError: if the data set does not come from `source`, or a value is out of range.
    """

    name: Literal["cifar10", "cifar100", "digits"] = "cifar10"
    source: Literal["folder", "hub", "embedded"] = "folder"
    normalization: str = "cifar10"
    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        sources = {"cifar10": ("folder", "hub"), "cifar100": ("folder", "hub"), "digits": ("embedded",)}
        if self.name not in sources:
            raise ValueError(f"unknown data set {self.name!r}; {nearest(self.name, sources)}")
        if self.source not in sources[self.name]:
            remedy = " or ".join(repr(source) for source in sources[self.name])
            raise ValueError(f"{self.name} cannot come from source {self.source!r}; set it to {remedy}.")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"unknown normalization {self.normalization!r}; {nearest(self.normalization, NORMALIZATIONS)}"
            )
        if self.padding < 0:
            raise ValueError(f"padding must be 0 or more pixels, got {self.padding}.")


def load(config: DataConfig, root: Path | None = None) -> ImageData:
    """The whole data set in memory, on the CPU.

    Args:
        config: which one, and its source.
        root: folder of the data, for source "folder"; see `load_cifar`.

    Raises:
        DataError: if the data set is missing or damaged.
        ModuleNotFoundError: if the source needs a package that is not installed.
    """
    if config.source == "embedded":
        return load_digits()
    if config.source == "hub":
        return load_cifar_hub(config.name)
    if root is None:
        raise DataError(f"{config.name} is read from a folder: name it with `--data DIR`.")
    return load_cifar(root, config.name)
