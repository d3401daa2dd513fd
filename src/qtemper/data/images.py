"""Image sets in memory, and their batches: shuffled, cropped, flipped, normalised.

Images stay uint8 (N, C, H, W) on one device until `normalize`. Every batch is a pure function of seed, epoch
and step, with no generator state in between, so that a run can stop anywhere and go on with the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtemper.counter import counter_uniform, derive_key

Batches = Iterator[tuple[Tensor, Tensor]]
"""Pairs (images, labels): float32 (B, C, H, W), normalised, and int64 (B,)."""

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
    "half": ((0.5,), (0.5,)),
}
"""Mean and standard deviation per channel, of pixels in [0, 1]; `half` fits any number of channels.

`cifar10` is what EWGS and chenyaofo's checkpoints use; its std is a mean over images of each one's own, less
than the std of all pixels.
"""

# First word of the keys: keeps these streams apart from one another and from the quantizers' noise.
_CROP_ROW, _CROP_COLUMN, _FLIP, _ORDER = 0x1D47A001, 0x1D47A002, 0x1D47A003, 0x1D47A004


class DataError(ValueError):
    """A data set is missing or damaged; the message is one sentence with the file and the remedy."""


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set for classification; `classes[label]` is the label's name."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`."""
        return ImageData(self.name, self.train.to(device), self.test.to(device), self.classes)


def shrink(split: Split, factor: int) -> Split:
    """Images smaller by a whole factor: each pixel the mean of `factor * factor`, rounded to uint8.

    Raises:
        ValueError: if the images' sides are no multiples of `factor`.
    """
    if factor == 1:
        return split
    if any(side % factor for side in split.images.shape[2:]):
        raise ValueError(f"images of {tuple(split.images.shape[2:])} pixels cannot shrink by {factor}; use a divisor.")
    # By parts: as float32 all of CIFAR-10 takes 600 MB.
    parts = [F.avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in torch.split(split.images, 4096)]
    return Split(torch.cat(parts), split.labels)


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """`(images / 255 - mean) / std`, per channel.

    Args:
        images: uint8, shape (N, C, H, W).
        mean: C values, or one for all channels, of pixels in [0, 1].
        std: like `mean`.

    Returns:
        float32, shape (N, C, H, W), on the images' device.

    Raises:
        ValueError: if `mean` or `std` has neither C values nor one.
    """
    for values in (mean, std):
        if len(values) not in (1, images.shape[1]):
            raise ValueError(
                f"{len(values)} values cannot normalise images of {images.shape[1]} channels; "
                'use normalization="half", which fits any number.'
            )
    shift, width = (_on_device(values, images.device).view(-1, 1, 1) for values in (mean, std))
    return (images.to(torch.float32) / 255 - shift) / width


def augment(images: Tensor, index: Tensor, *, seed: int, epoch: int, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crop from a black border and random horizontal flip, one of each per image.

    An image's crop depends on `seed`, `epoch` and its own `index` alone, not on its batch or the device.

    Args:
        images: uint8, shape (N, C, H, W), before normalisation.
        index: each image's position in its data set, integer, shape (N,).
        seed: the run's seed.
        epoch: passes over the data set so far.
        padding: width of the border, in pixels; the crop moves by up to this much in each direction.
        flip: whether to mirror every image with probability 1/2.

    Returns:
        Like `images`.
    """
    count, channels, height, width = images.shape
    index = index.to(torch.int32)

    def uniform(stream: int) -> Tensor:
        # The key stays on the CPU: its two words enter as scalars, without a copy for which a GPU waits.
        return counter_uniform(index, torch.tensor(derive_key(stream, seed, epoch), dtype=torch.int32))

    # `2 * padding + 1` is odd, and u <= 1 - 2**-24, so that the float32 product always stays below it.
    top, left = ((uniform(s) * (2 * padding + 1)).to(torch.int64) for s in (_CROP_ROW, _CROP_COLUMN))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip:
        columns = torch.where(uniform(_FLIP)[:, None] < 0.5, columns.flip(1), columns)
    columns = left[:, None] + columns

    bordered = F.pad(images, (padding,) * 4)
    pixels = (rows[:, :, None] * bordered.shape[3] + columns[:, None, :]).view(count, 1, -1)
    return bordered.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def epoch_order(n: int, *, seed: int, epoch: int) -> Tensor:
    """A permutation of `0 .. n - 1`, int64, on the CPU: a pure function of `seed` and `epoch`."""
    generator = torch.Generator().manual_seed(derive_key(_ORDER, seed, epoch)[0])
    return torch.randperm(n, generator=generator)


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    padding: int = 4,
    flip: bool = True,
    mean: Sequence[float],
    std: Sequence[float],
) -> Batches:
    """The full batches of one epoch, shuffled, augmented and normalised, on the split's device.

    The `len(split) % batch_size` images that do not fill a batch are dropped: other ones in every epoch.

    Args:
        split: the images.
        batch_size: images per batch.
        seed: the run's seed.
        epoch: passes over the data set so far.
        first_step: batches to leave out; the rest is the same as without.
        rank: of this process; it gets the `rank`-th of `world_size` equal parts of every batch.
        world_size: number of processes.
        padding: see `augment`.
        flip: see `augment`.
        mean: see `normalize`.
        std: see `normalize`.

    Raises:
        ValueError: see `epoch_share`.
    """
    share, num_steps = epoch_share(len(split), batch_size, first_step, rank, world_size)
    device = split.images.device
    order = epoch_order(len(split), seed=seed, epoch=epoch).to(device)
    shift, width = _on_device(mean, device), _on_device(std, device)  # once: a copy makes a GPU wait

    def batch(step: int) -> tuple[Tensor, Tensor]:
        first = step * batch_size + rank * share
        index = order[first : first + share]
        images = augment(split.images[index], index, seed=seed, epoch=epoch, padding=padding, flip=flip)
        return normalize(images, shift, width), split.labels[index]

    return map(batch, range(first_step, num_steps))


def epoch_share(images: int, batch_size: int, first_step: int, rank: int, world_size: int) -> tuple[int, int]:
    """Images of a batch that one process gets, and full batches of an epoch.

    Raises:
        ValueError: if `batch_size` is below 1 or no batch is full, `first_step` is not one of the epoch's steps,
            `rank` is not below `world_size`, or the batch does not divide by it.
    """
    check_batch(batch_size, rank, world_size)
    share = batch_share(batch_size, world_size)
    if batch_size > images:
        raise ValueError(f"batch_size {batch_size} is more than the {images} images: no batch is full; lower it.")
    num_steps = images // batch_size
    if not 0 <= first_step <= num_steps:
        raise ValueError(f"first_step must be 0 to {num_steps} (batches per epoch), got {first_step}.")
    return share, num_steps


def batch_share(batch_size: int, world_size: int) -> int:
    """Images of a batch that each of `world_size` processes gets.

    Raises:
        ValueError: if the batch does not divide.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} does not divide by {world_size} processes; make it a multiple of {world_size}."
        )
    return batch_size // world_size


def test_batches(split: Split, batch_size: int, mean: Sequence[float], std: Sequence[float]) -> Batches:
    """All images in their order, normalised; the last batch may be smaller.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    check_batch(batch_size)
    parts = (slice(first, first + batch_size) for first in range(0, len(split), batch_size))
    return ((normalize(split.images[part], mean, std), split.labels[part]) for part in parts)


def _on_device(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)


def check_batch(batch_size: int, rank: int = 0, world_size: int = 1) -> None:
    """Whether these numbers can be.

    Raises:
        ValueError: naming the one that cannot.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1, got rank {rank} of world_size {world_size}.")
