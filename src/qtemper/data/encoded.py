"""Where encoded images come from: the interface, and folders of files.

A source reads one encoded image by its index, in whatever process asks; decoding is `decode`'s. `webdataset` and `hub`
hold the other sources.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from qtemper.data.images import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""Endings of image files, in lower case."""

CLASSES_FILE = "imagenet_classes.json"
"""Names of numbered labels: `{"name": [...]}`, in the data's folder or the one above."""


class ImageError(DataError):
    """One image is missing or damaged.

    Args:
        path: of the image.
        reason: what is wrong, after "is".
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} is {self.reason}: restore it, or set data.skip_limit to go on without it."


def unreadable(path: str, error: Exception) -> ImageError:
    """The error for an image whose file could not be read."""
    return ImageError(path, f"missing or cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})")


@dataclass(frozen=True)
class Encoded:
    """An encoded image: the file's content, its label, and its path (or the like) for messages."""

    data: bytes
    label: int
    path: str


class ImageSource(ABC):
    """Encoded images by their index; workers hold a copy, so it keeps no open file."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, index: int) -> Encoded:
        """One image.

        Raises:
            ImageError: if it cannot be read.
        """


class ImageStream(ABC):
    """Encoded images one after the other, where reading by an index is not possible."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images in one pass."""

    @abstractmethod
    def stream(self, order: tuple[int, int] | None, first: int = 0) -> Iterator[Encoded]:
        """One pass.

        Args:
            order: (seed, epoch) of the shuffling, or None for the stream's own order.
            first: images to leave out at the beginning.
        """


@final
class FileSource(ImageSource):
    """Image files with their labels.

    Args:
        files: (path, label) of each.
    """

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Encoded:
        """See `ImageSource`."""
        path, label = self.files[index]
        try:
            return Encoded(path.read_bytes(), label, str(path))
        except OSError as error:
            raise unreadable(str(path), error) from error


def folder_sources(root: Path) -> tuple[FileSource, FileSource, tuple[str, ...]]:
    """Training images, test images and class names of a folder.

    Two layouts are read, for either part:

    - a tree `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg` (.jpeg, .png, .webp): the sorted names of the
      folders in `train` (without one, in `val`) are the classes;
    - `labels.csv` with columns `file` and `label` in `root`, or in `root/train` or `root/val`, beside its files: class
      names come from `imagenet_classes.json` where that is there, else they are the numbers.

    A flat `root` with `labels.csv` is the test set. Where there is no folder `train`, the test images are the training
    images too: to try the code on a few images, not for results.

    Raises:
        DataError: if there is no image, or a class or label of the test set is unknown.
    """
    train, test = root / "train", root / "val"
    if not test.is_dir() and (root / "labels.csv").is_file():
        test = root
    if not test.is_dir():
        raise DataError(
            f"{root} does not hold images: put them into {root / 'train'} and {test}, one folder per class, "
            "or list them in labels.csv."
        )
    if not train.is_dir() and test != root:
        other = [path.name for path in root.iterdir() if path.is_dir() and path.name.lower().startswith("train")]
        if other:
            raise DataError(f"{root} has {other[0]} and no folder train; rename it.")
    train = train if train.is_dir() else test
    if (train / "labels.csv").is_file() or (test / "labels.csv").is_file():
        known = _sorted_folders(train) if not (train / "labels.csv").is_file() else None
        classes = class_names(root, known)
    else:
        classes = _sorted_folders(train)
    tested = _files(test, classes)
    trained = tested if train == test else _files(train, classes)
    classes = numbered_classes(classes, [label for part in (trained, tested) for _, label in part.files])
    return trained, tested, classes


def class_names(root: Path, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Names from `imagenet_classes.json` in `root` or the folder above; else `default`, else none.

    Raises:
        DataError: if the file is damaged.
    """
    for path in (root / CLASSES_FILE, root.parent / CLASSES_FILE):
        if default is None and path.is_file():
            try:
                names = json.loads(path.read_bytes())["name"]
                return tuple(str(name) for name in names)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{path} is damaged: restore it (`{{"name": [...]}}`), or delete it.') from error
    return default or ()


def numbered_classes(classes: tuple[str, ...], labels: list[int]) -> tuple[str, ...]:
    """`classes`, or where there are none the numbers up to the highest label.

    Raises:
        DataError: if a label is negative or has no class.
    """
    lowest, highest = min(labels), max(labels)
    classes = classes or tuple(str(i) for i in range(highest + 1))
    if lowest < 0 or highest >= len(classes):
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"label {wrong} is not one of 0 to {len(classes) - 1}: give the data set's own labels.")
    return classes


def _sorted_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))


def _files(folder: Path, classes: tuple[str, ...]) -> FileSource:
    table = folder / "labels.csv"
    files = _listed(table) if table.is_file() else _tree(folder, classes)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}): fill it, one folder per class.")
    return FileSource(files)


def _tree(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for name in _sorted_folders(folder):
        if name not in labels:
            raise DataError(f"{folder / name} is no class of the training set: remove it, or add it there.")
        images = (path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        files += [(path, labels[name]) for path in sorted(images)]
    return files


def _listed(table: Path) -> list[tuple[Path, int]]:
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [(table.parent / row["file"], int(row["label"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{table} is damaged (not a table with columns file and label): restore it.") from error
    return rows
