"""What the engine trains on: a `Source` of normalised batches, and the one for images that lie in memory."""

from __future__ import annotations

from typing import Protocol, final

from torch import Tensor

from qtemper.data.images import (
    NORMALIZATIONS,
    Batches,
    ImageData,
    Split,
    check_batch,
    epoch_order,
    test_batches,
    train_batches,
)


class Source(Protocol):
    """Batches of a data set: a pure function of (seed, epoch, step), shared out among processes.

    Attributes:
        name: of the data set.
        classes: names of the labels.
        channels: of the images.
        train_size: number of training images.
        test_size: number of test images.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    train_size: int
    test_size: int

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        """This process's equal part of every full batch of an epoch, from `first_step` on."""
        ...

    def test_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batches:
        """This process's part of the test images: every `world_size`-th batch, from the `rank`-th on."""
        ...

    def calibration_batches(self, batch_size: int, count: int, *, seed: int) -> list[Tensor]:
        """Normalised training images without augmentation, `count` batches drawn by the seed."""
        ...


@final
class MemorySource:
    """Images in memory, as uint8 on one device.

    Args:
        data: the images; batches come from their device.
        normalization: key of `NORMALIZATIONS`.
        padding: see `augment`.
        flip: see `augment`.
    """

    def __init__(self, data: ImageData, normalization: str, *, padding: int = 4, flip: bool = True) -> None:
        self.name, self.classes = data.name, data.classes
        self.channels = data.train.images.shape[1]
        self.train_size, self.test_size = len(data.train), len(data.test)
        self.data = data
        self.mean, self.std = NORMALIZATIONS[normalization]
        self.padding, self.flip = padding, flip

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        """See `images.train_batches`."""
        return train_batches(
            self.data.train,
            batch_size,
            seed=seed,
            epoch=epoch,
            first_step=first_step,
            rank=rank,
            world_size=world_size,
            padding=self.padding,
            flip=self.flip,
            mean=self.mean,
            std=self.std,
        )

    def test_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batches:
        """See `Source`."""
        check_batch(batch_size, rank, world_size)
        batches = test_batches(self.data.test, batch_size, self.mean, self.std)
        return (batch for i, batch in enumerate(batches) if i % world_size == rank)

    def calibration_batches(self, batch_size: int, count: int, *, seed: int) -> list[Tensor]:
        """See `Source`."""
        train = self.data.train
        chosen = epoch_order(len(train), seed=seed, epoch=0)[: count * batch_size].to(train.images.device)
        sample = Split(train.images[chosen], train.labels[chosen])
        return [images for images, _ in test_batches(sample, batch_size, self.mean, self.std)]
