"""ImageNet and other sets of image files, decoded in worker processes: batches as functions of (seed, epoch, step).

A worker turns a list of image numbers into one uint8 batch of crops. Nothing of it has a state to save: the order and
every crop follow from seed, epoch and index, whatever the number of workers and processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtemper.data.decode import eval_pixels, train_pixels
from qtemper.data.encoded import Encoded, ImageError, ImageSource, ImageStream
from qtemper.data.images import (
    NORMALIZATIONS,
    Batches,
    DataError,
    check_batch,
    epoch_order,
    epoch_share,
    normalize,
)
from qtemper.errors import optional_module

TIMEOUT = 300.0
"""Seconds after which a batch that no worker delivers (a network drive that hangs) is an error."""

_Key = int | tuple[int, Encoded]
"""What a worker is sent: an image's index, or its position in a stream and itself."""

_Decoded = tuple[Tensor | None, list[int], list[tuple[str, str]]]
"""What it returns: uint8 images, None if they could not be filled; labels; (path, message) of damaged images."""


@final
class ImageFiles:
    """A set of encoded images, as a `Source` of normalised batches.

    Attributes:
        name: of the data set.
        classes: names of the labels.
        channels: 3.
        train_size: number of training images.
        test_size: number of test images.

    Args:
        name: of the data set.
        classes: names of the labels.
        train: the training images.
        test: the test images.
        normalization: key of `NORMALIZATIONS`.
        image_size: side of the images in a batch, in pixels.
        flip: whether training images are mirrored at random.
        workers: decoding processes; 0 decodes in the calling one.
        skip_limit: how many damaged or missing images may be replaced by the next one, in each process and its
            lifetime; each is reported by a warning, and the next one is an error.
        device: where batches go before they are normalised.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        train: ImageSource | ImageStream,
        test: ImageSource | ImageStream,
        *,
        normalization: str = "imagenet",
        image_size: int = 224,
        flip: bool = True,
        workers: int = 2,
        skip_limit: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        optional_module("PIL.Image", "train")  # what is missing shows now, and not in a worker
        self.name, self.classes, self.channels = name, classes, 3
        self.train, self.test = train, test
        self.train_size, self.test_size = len(train), len(test)
        self.mean, self.std = NORMALIZATIONS[normalization]
        self.image_size, self.flip = image_size, flip
        self.workers, self.skip_limit = workers, skip_limit
        self.device = torch.device(device)
        self._skipped: set[str] = set()

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        """One epoch: shuffled, RandomResizedCrop, flipped, normalised; images that fill no batch are dropped.

        Args:
            batch_size: images per batch, of all processes together.
            seed: the run's seed.
            epoch: passes over the data set so far.
            first_step: batches to leave out; the rest is the same as without.
            rank: of this process; it gets the `rank`-th of `world_size` equal parts of every batch.
            world_size: number of processes.

        Returns:
            Pairs of float32 (batch_size / world_size, 3, image_size, image_size) and int64 (batch_size / world_size,).
            While they are read, a `DataError` names an image that is damaged or missing, or says that a worker died.

        Raises:
            ValueError: see `images.epoch_share`.
        """
        share, num_steps = epoch_share(self.train_size, batch_size, first_step, rank, world_size)
        if self.train is self.test:
            warnings.warn("there is no folder train: the network trains on its test images.", stacklevel=2)
        keys = _ordered(self.train, (seed, epoch), first_step * batch_size, num_steps * batch_size)
        shares = (batch[rank * share : (rank + 1) * share] for batch in _chunks(keys, batch_size))
        crops = (seed, epoch, self.flip)
        return self._batches(_Decoder(self.train, self.image_size, self.skip_limit, crops), shares)

    def test_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batches:
        """The test images in their order: shorter side resized to 256/224 of `image_size`, centre cut out, normalised.

        Args:
            batch_size: images per batch; the last one may be smaller.
            rank: of this process; it gets every `world_size`-th batch, from the `rank`-th on.
            world_size: number of processes.

        Raises:
            ValueError: if `batch_size` or `rank` is out of range.
        """
        check_batch(batch_size, rank, world_size)
        batches = islice(_chunks(_ordered(self.test, None, 0, self.test_size), batch_size), rank, None, world_size)
        return self._batches(_Decoder(self.test, self.image_size, self.skip_limit), batches)

    def calibration_batches(self, batch_size: int, count: int, *, seed: int) -> list[Tensor]:
        """Training images without augmentation, prepared as for evaluation: `count` batches drawn by the seed."""
        check_batch(batch_size)
        keys = _ordered(self.train, (seed, 0), 0, min(self.train_size, batch_size * count))
        decoder = _Decoder(self.train, self.image_size, self.skip_limit)
        return [images for images, _ in self._batches(decoder, _chunks(keys, batch_size))]

    def _batches(self, decoder: _Decoder, keys: Iterable[list[_Key]]) -> Batches:
        loader: DataLoader[_Decoded] = DataLoader(
            decoder,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=_same,
            timeout=TIMEOUT if self.workers else 0,
            generator=torch.Generator(),  # otherwise it advances the global one
        )
        mean, std = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))  # a copy, so once
        for pixels, labels, damaged in _until_a_worker_dies(iter(loader)):
            for path, message in damaged:
                self._skip(path, message)
            if pixels is None:
                raise DataError(damaged[-1][1])
            images = pixels.to(self.device)
            yield normalize(images, mean, std), torch.tensor(labels, device=self.device)

    def _skip(self, path: str, message: str) -> None:
        if path in self._skipped:
            return
        if len(self._skipped) >= self.skip_limit:
            others = f" ({len(self._skipped)} others were skipped, data.skip_limit allows no more)"
            raise DataError(message.rstrip(".") + (others if self._skipped else "") + ".")
        self._skipped.add(path)
        warnings.warn(f"skipped: {message}", stacklevel=2)


class _Decoder(Dataset[_Decoded]):
    """What a worker does: the keys of a batch to its pixels.

    Args:
        source: of the images.
        size: side of the crops, in pixels.
        skip_limit: how many images in a row may be replaced by their next one.
        crops: (seed, epoch, flip) of training; None for evaluation.
    """

    def __init__(
        self,
        source: ImageSource | ImageStream,
        size: int,
        skip_limit: int,
        crops: tuple[int, int, bool] | None = None,
    ) -> None:
        # A stream is read by the calling process, and may not be able to go into another one.
        self.source = source if isinstance(source, ImageSource) else None
        self.size, self.skip_limit, self.crops = size, skip_limit, crops

    def __getitems__(self, keys: list[_Key]) -> _Decoded:
        pixels, labels = [], []
        damaged: dict[str, str] = {}
        for slot in range(len(keys)):
            for attempt in range(self.skip_limit + 1):
                try:
                    image, label = self._image(self._successor(keys, slot, attempt))
                except ImageError as error:
                    damaged[error.path] = str(error)
                else:
                    pixels.append(image)
                    labels.append(label)
                    break
            else:
                return None, [], list(damaged.items())
        return torch.stack(pixels), labels, list(damaged.items())

    def _successor(self, keys: list[_Key], slot: int, attempt: int) -> _Key:
        key = keys[slot]
        if isinstance(key, int) and self.source is not None:
            return (key + attempt) % len(self.source)
        return keys[(slot + attempt) % len(keys)]

    def _image(self, key: _Key) -> tuple[Tensor, int]:
        if isinstance(key, int):
            assert self.source is not None
            index, encoded = key, self.source.read(key)
        else:
            index, encoded = key
        if self.crops is None:
            return eval_pixels(encoded, self.size), encoded.label
        seed, epoch, flip = self.crops
        pixels = train_pixels(encoded, self.size, seed=seed, epoch=epoch, index=index, flip=flip)
        return pixels, encoded.label


def _until_a_worker_dies(batches: Iterator[Any]) -> Iterator[_Decoded]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            # torch's, for a worker that was killed or a batch that takes too long; or its batch went away with it.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                raise
            raise DataError(
                f"an image decoding process died or hangs ({' '.join(str(error).split())[:200].rstrip('.')}): out of "
                "memory or of /dev/shm, perhaps, so lower data.workers, or set it to 0 to decode without processes."
            ) from error
        yield batch


def _ordered(source: ImageSource | ImageStream, order: tuple[int, int] | None, first: int, stop: int) -> Iterable[_Key]:
    """Keys of the images `first .. stop - 1` in the order of (seed, epoch), or as they lie."""
    if isinstance(source, ImageStream):
        return islice(enumerate(source.stream(order, first), first), stop - first)
    if order is None:
        return range(first, stop)
    seed, epoch = order
    indices: list[int] = epoch_order(len(source), seed=seed, epoch=epoch)[first:stop].tolist()
    return indices


def _chunks(keys: Iterable[_Key], size: int) -> Iterator[list[_Key]]:
    iterator = iter(keys)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _same(batch: Any) -> Any:
    return batch
