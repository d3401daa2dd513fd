"""Data sets for image classification: one interface, `load(config, root)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qtemper.data.cifar import load_cifar, load_cifar_hub
from qtemper.data.digits import load_digits
from qtemper.data.encoded import folder_sources
from qtemper.data.hub import hub_sources
from qtemper.data.imagenet import ImageFiles
from qtemper.data.images import (
    NORMALIZATIONS,
    DataError,
    ImageData,
    Split,
    augment,
    epoch_order,
    normalize,
    shrink,
    test_batches,
    train_batches,
)
from qtemper.data.source import MemorySource, Source
from qtemper.data.webdataset import webdataset_sources
from qtemper.errors import nearest

__all__ = [
    "NORMALIZATIONS",
    "DataConfig",
    "DataError",
    "ImageData",
    "ImageFiles",
    "MemorySource",
    "Source",
    "Split",
    "augment",
    "epoch_order",
    "load",
    "load_cifar",
    "load_cifar_hub",
    "load_digits",
    "load_imagenet",
    "normalize",
    "open_source",
    "test_batches",
    "train_batches",
]


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and what happens to them before the model.

    Attributes:
        name: the data set.
        source: where it comes from: "folder" (CIFAR, ImageNet, below `--data DIR`), "hub" (the same, Hugging Face),
            "webdataset" (ImageNet, tar shards below `--data DIR`) or "embedded" (digits, which come with scikit-learn).
        normalization: key of `NORMALIZATIONS`; a float checkpoint needs the one that it was trained with.
        padding: black border of the random crop in training, in pixels; no effect on ImageNet.
        flip: whether training images are mirrored at random; not for digits, where it changes the meaning.
        image_size: side of ImageNet's images in a batch, in pixels; others have their own.
        workers: processes that decode ImageNet's images; 0 decodes in the main one. Results do not depend on it.
        skip_limit: how many damaged or missing images of ImageNet may be replaced by the next one, with a warning.
        shrink: images in memory become smaller by this factor, each pixel the mean of a square; 1 leaves them.
        train_images: only so many training images, the first ones, of a data set in memory; 0 is all.
        held_out: "test" images are the last so many training images, which are then not trained on, instead of the test
            set: to choose settings by. For a data set in memory; 0 is the test set.

    Raises:
        ValueError: if the data set does not come from `source`, or a value is out of range.
    """

    name: Literal["cifar10", "cifar100", "digits", "imagenet"] = "cifar10"
    source: Literal["folder", "hub", "embedded", "webdataset"] = "folder"
    normalization: str = "cifar10"
    padding: int = 4
    flip: bool = True
    image_size: int = 224
    workers: int = 2
    skip_limit: int = 0
    shrink: int = 1
    train_images: int = 0
    held_out: int = 0

    def __post_init__(self) -> None:
        sources = {
            "cifar10": ("folder", "hub"),
            "cifar100": ("folder", "hub"),
            "digits": ("embedded",),
            "imagenet": ("folder", "hub", "webdataset"),
        }
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
        for name in ("image_size", "workers", "skip_limit", "shrink", "train_images", "held_out"):
            least = 1 if name in ("image_size", "shrink") else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        if self.name == "imagenet" and (self.shrink != 1 or self.train_images or self.held_out):
            raise ValueError("shrink, train_images and held_out are for data sets in memory; leave them for imagenet.")


def load(config: DataConfig, root: Path | None = None) -> ImageData:
    """The whole data set in memory, on the CPU.

    Args:
        config: which one, and its source.
        root: folder of the data, for source "folder"; see `load_cifar`.

    Raises:
        DataError: if the data set is missing or damaged.
        ModuleNotFoundError: if the source needs a package that is not installed.
        ValueError: if it is ImageNet, which is read while it is used: see `load_imagenet`.
    """
    if config.name == "imagenet":
        raise ValueError("imagenet is not held in memory: use load_imagenet or open_source.")
    if config.source == "embedded":
        return load_digits()
    if config.source == "hub":
        return load_cifar_hub(config.name)
    if root is None:
        raise DataError(f"{config.name} is read from a folder: name it with `--data DIR`.")
    return load_cifar(root, config.name)


def load_imagenet(
    config: DataConfig,
    root: Path | None = None,
    *,
    hub_name: str = "ILSVRC/imagenet-1k",
    streaming: bool = False,
    device: torch.device | str = "cpu",
) -> ImageFiles:
    """ImageNet, or any other set of image files, decoded while it is used.

    Args:
        config: source, normalisation, size, workers.
        root: folder of the images (see `folder_sources`), of the shards (see `webdataset_sources`), or, for source
            "hub", of parquet files; without one, "hub" is Hugging Face's hub.
        hub_name: the dataset on the hub.
        streaming: source "hub": read while downloading; resuming is then less exact, see `HubStream`.
        device: where batches go before they are normalised.

    Raises:
        DataError: if the data set is missing or damaged; a damaged image shows when it is read.
        ModuleNotFoundError: if the source needs a package that is not installed.
    """
    if config.source == "hub":
        train, test, classes = hub_sources(hub_name if root is None else str(root), streaming=streaming)
    elif root is None:
        raise DataError(f"{config.name} is read from a folder: name it with `--data DIR`.")
    else:
        train, test, classes = (folder_sources if config.source == "folder" else webdataset_sources)(root)
    return ImageFiles(
        config.name,
        classes,
        train,
        test,
        normalization=config.normalization,
        image_size=config.image_size,
        flip=config.flip,
        workers=config.workers,
        skip_limit=config.skip_limit,
        device=device,
    )


def open_source(config: DataConfig, root: Path | None = None, device: torch.device | str = "cpu") -> Source:
    """The data set as batches for the engine.

    Args:
        config: which one, normalisation, augmentation.
        root: folder of the data, for source "folder".
        device: where images in memory, and so their batches, live.

    Raises:
        DataError: if the data set is missing or damaged.
    """
    if config.name == "imagenet":
        return load_imagenet(config, root, device=device)
    data = load(config, root)
    train, test = _choose(config, data)
    data = ImageData(data.name, shrink(train, config.shrink), shrink(test, config.shrink), data.classes)
    return MemorySource(data.to(device), config.normalization, padding=config.padding, flip=config.flip)


def _choose(config: DataConfig, data: ImageData) -> tuple[Split, Split]:
    """Images to train on, the first ones, and images to test with, which are the last ones or the test set."""
    train, test = data.train, data.test
    size = config.train_images or max(1, len(train) - config.held_out)
    if size + config.held_out > len(train):
        wanted = f"train_images is {config.train_images}" + (
            f" and held_out is {config.held_out}" if config.held_out else ""
        )
        raise ValueError(f"{wanted} but {data.name} has {len(train)} training images; set fewer.")
    if config.held_out:
        test = Split(train.images[-config.held_out :], train.labels[-config.held_out :])
    if config.train_images or config.held_out:
        train = Split(train.images[:size], train.labels[:size])
    return train, test
