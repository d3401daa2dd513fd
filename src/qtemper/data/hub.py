"""Images of the Hugging Face hub, or of a folder of its parquet files; needs the extra `hub`.

Columns `image` and `label`, as in `ILSVRC/imagenet-1k`. Images stay encoded until a worker decodes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from qtemper.counter import derive_key
from qtemper.data.encoded import Encoded, ImageSource, ImageStream, numbered_classes, unreadable
from qtemper.data.images import DataError
from qtemper.errors import optional_module

_SHUFFLE = 0x1D47A013

BUFFER = 1_000
"""Images among which a stream shuffles, beside the order of its files: about 100 MB of ImageNet."""


@final
class HubSource(ImageSource):
    """Rows of a map-style dataset.

    Args:
        rows: a `datasets.Dataset` with columns `image` (not decoded) and `label`.
        name: of the dataset and its split, for messages.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Encoded:
        """See `ImageSource`."""
        return _encoded(self.rows[index], self.name, index)


@final
class HubStream(ImageStream):
    """Rows of a dataset that is downloaded while it is read.

    What is weaker than with an indexable source: the order is shuffled by file and within a buffer of `BUFFER` images
    only; it is the same after a stop only with the same version of `datasets` and the same revision of the dataset;
    resuming in the middle of an epoch reads, and drops, what came before; every process reads the whole stream; a
    skipped image is replaced by another one of its batch.

    Args:
        rows: a `datasets.IterableDataset` with columns `image` (not decoded) and `label`.
        name: of the dataset and its split, for messages.
        size: number of images.
    """

    def __init__(self, rows: Any, name: str, size: int) -> None:
        self.rows = rows
        self.name = name
        self.size = size

    def __len__(self) -> int:
        return self.size

    def stream(self, order: tuple[int, int] | None, first: int = 0) -> Iterator[Encoded]:
        """See `ImageStream`.

        Raises:
            DataError: if the stream breaks off.
        """
        rows = self.rows
        if order is not None:
            rows = rows.shuffle(seed=derive_key(_SHUFFLE, *order)[0] & 0x7FFFFFFF, buffer_size=BUFFER)
        iterator = iter(rows.skip(first) if first else rows)
        for position in range(first, self.size):
            try:
                row = next(iterator)
            except StopIteration:
                raise DataError(f"{self.name} ended at image {position} of {self.size}: load it anew.") from None
            except Exception as error:  # see `_load`
                raise DataError(
                    f"{self.name} broke off at image {position} ({type(error).__name__}): resume when it is back."
                ) from error
            yield _encoded(row, self.name, position)


def hub_sources(name: str, *, streaming: bool = False) -> tuple[Any, Any, tuple[str, ...]]:
    """Training images, test images and class names.

    The test set is the split `validation`, else `val`, else `test` (ImageNet's has no labels).

    Args:
        name: the dataset's name on the hub, or a folder of its parquet files.
        streaming: read while downloading, see `HubStream`, instead of downloading first.

    Returns:
        Two `HubSource`, or `HubStream` if `streaming`, and the names.

    Raises:
        DataError: if the dataset cannot be loaded, or lacks a split or a column.
        ModuleNotFoundError: if `datasets` is not installed.
    """
    datasets = optional_module("datasets", "hub")
    parts = _load(datasets, name, streaming)
    test = next((split for split in ("validation", "val", "test") if split in parts), None)
    if "train" not in parts or test is None:
        raise DataError(f"{name} has splits {', '.join(parts) or 'none'}: give one with train and validation.")
    sources: list[Any] = []
    for split in ("train", test):
        part = parts[split]
        if part.features is None or not {"image", "label"} <= set(part.features):
            raise DataError(f"{name} [{split}] lacks the column image or label: rename them in the dataset.")
        rows = part.cast_column("image", datasets.Image(decode=False))
        where = f"{name} [{split}]"
        size = _stream_size(part, split, where) if streaming else 0
        sources.append(HubStream(rows, where, size) if streaming else HubSource(rows, where))
    return sources[0], sources[1], _class_names(parts, test, streaming)


def _load(datasets: Any, name: str, streaming: bool) -> Any:
    try:
        return datasets.load_dataset(name, streaming=streaming)
    except Exception as error:  # the hub's client has raised types of three HTTP libraries over its versions
        raise DataError(
            f"{name} could not be loaded by Hugging Face datasets ({type(error).__name__}): go online, log in "
            "(`hf auth login`) where the dataset asks for it, or name a folder of its parquet files with `--data DIR`."
        ) from error


def _class_names(parts: Any, test: str, streaming: bool) -> tuple[str, ...]:
    names = getattr(parts["train"].features["label"], "names", None)
    if names or streaming:
        if not names:
            raise DataError("a stream without class names cannot be used: its column label must be a ClassLabel.")
        return tuple(names)
    return numbered_classes((), [int(label) for split in ("train", test) for label in parts[split]["label"]])


def _stream_size(part: Any, split: str, name: str) -> int:
    info = (part.info.splits or {}).get(split)
    if info is None or not info.num_examples:
        raise DataError(f"{name} does not say how many images it has: load it without streaming.")
    return int(info.num_examples)


def _encoded(row: dict[str, Any], name: str, index: int) -> Encoded:
    image = row["image"] or {}
    path = f"{name} image {index}" + (f" ({image['path']})" if image.get("path") else "")
    data = image.get("bytes")
    if data is None:
        try:
            data = Path(image["path"]).read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise unreadable(path, error) from error
    return Encoded(data, int(row["label"]), path)
