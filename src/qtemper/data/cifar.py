"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): from a folder or from the Hugging Face hub.

Two folder layouts are read:

- official, the author's "python version": `data_batch_1` .. `test_batch`, or `train` and `test`. Every md5 is
  checked, and a restricted unpickler reads the files, since a pickle can otherwise run any code.
- webp, half the size: `train-000.webp` .. `test-019.webp` (lossless, 500 images stacked vertically),
  `train_labels.npy`, `test_labels.npy`, `meta.json`. Counts, sizes and ranges are checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from qtemper.data.images import DataError, ImageData, Split
from qtemper.errors import optional_module

HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
"""Where the author publishes both sets; the "python version" is the one to unpack."""

_IMAGES_PER_WEBP = 500
_SIZES = {"train": 50_000, "test": 10_000}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Archive:
    """The official files of one data set; `md5` is in the order train files, test file, class names."""

    folder: str
    md5: dict[str, str]
    labels: bytes
    class_names: bytes
    num_classes: int
    hub_id: str
    hub_labels: str


_ARCHIVES = {
    "cifar10": _Archive(
        folder="cifar-10-batches-py",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        labels=b"labels",
        class_names=b"label_names",
        num_classes=10,
        hub_id="uoft-cs/cifar10",
        hub_labels="label",
    ),
    "cifar100": _Archive(
        folder="cifar-100-python",
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        labels=b"fine_labels",
        class_names=b"fine_label_names",
        num_classes=100,
        hub_id="uoft-cs/cifar100",
        hub_labels="fine_label",
    ),
}


def load_cifar(root: Path, name: str) -> ImageData:
    """CIFAR from a folder; CIFAR-100 with its 100 fine labels.

    Args:
        root: the data set's own folder, or the folder that holds it as `cifar10`, `cifar-10-batches-py`,
            `cifar100` or `cifar-100-python`.
        name: "cifar10" or "cifar100".

    Raises:
        DataError: if a file is missing or damaged.
        ModuleNotFoundError: if the layout is webp and Pillow is not installed.
        ValueError: if `name` is neither.
    """
    archive = _archive(name)
    for folder in (root, root / name):
        if any(folder.glob("*-000.webp")):
            return _load_webp(folder, name)
    for folder in (root, root / archive.folder):
        if any((folder / file).is_file() for file in archive.md5):
            return _load_official(folder, name)
    raise DataError(f"{root} does not hold {name}: {_remedy(name)}.")


def load_cifar_hub(name: str) -> ImageData:
    """CIFAR from the Hugging Face hub (`uoft-cs/cifar10`, `uoft-cs/cifar100`), or from its cache.

    Raises:
        DataError: if the hub does not deliver.
        ModuleNotFoundError: if `datasets` is not installed.
        ValueError: if `name` is neither "cifar10" nor "cifar100".
    """
    archive = _archive(name)
    datasets = optional_module("datasets", "hub")
    try:
        parts = datasets.load_dataset(archive.hub_id)
    except Exception as error:  # the hub's client has raised types of three HTTP libraries over its versions
        raise DataError(
            f"{archive.hub_id} could not be loaded from the Hugging Face hub ({type(error).__name__}): "
            f"go online once to fill its cache, or {_remedy(name)} and set source='folder'."
        ) from error

    def split(part: Any) -> Split:
        images = np.stack([np.asarray(image.convert("RGB")) for image in part["img"]])
        return _split(images.transpose(0, 3, 1, 2), np.array(list(part[archive.hub_labels])))

    classes = tuple(parts["train"].features[archive.hub_labels].names)
    return ImageData(name, split(parts["train"]), split(parts["test"]), classes)


def _archive(name: str) -> _Archive:
    if name not in _ARCHIVES:
        raise ValueError(f"name must be 'cifar10' or 'cifar100', got {name!r}.")
    return _ARCHIVES[name]


def _remedy(name: str) -> str:
    return f"download the python version from {HOMEPAGE} and unpack {_ARCHIVES[name].folder} there"


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing or cannot be read: {_remedy(name)}.") from error


def _split(images: Array, labels: Array) -> Split:
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.uint8))
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


# --- the official layout ------------------------------------------------------------------------------------


def _load_official(folder: Path, name: str) -> ImageData:
    archive = _ARCHIVES[name]
    *train, test, meta = archive.md5

    def split(files: list[str]) -> Split:
        batches = [_read_official(folder / file, name) for file in files]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        return _split(images, np.concatenate([batch[archive.labels] for batch in batches]))

    classes = tuple(word.decode() for word in _read_official(folder / meta, name)[archive.class_names])
    return ImageData(name, split(train), split([test]), classes)


def _read_official(path: Path, name: str) -> dict[bytes, Any]:
    data = _read(path, name)
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != _ARCHIVES[name].md5[path.name]:
        raise DataError(f"{path} is damaged (its md5 is not the official one): {_remedy(name)}.")
    try:
        content: dict[bytes, Any] = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused ({error}): {_remedy(name)}.") from error
    return content


def _uint8_dtype(code: bytes, *_: object) -> np.dtype[np.uint8]:
    # A fresh copy, because the pickle then sets its state.
    if code != b"u1":
        raise pickle.UnpicklingError(f"array of {code!r}, not of bytes")
    return np.dtype(np.uint8, copy=True)


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and uint8 arrays; a pickle can call only what is named here."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        # From a public object, because its module was renamed in numpy 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _uint8_dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image file needs")
        return self.allowed[module, name]


# --- the webp layout ----------------------------------------------------------------------------------------


def _load_webp(folder: Path, name: str) -> ImageData:
    classes = _webp_classes(folder / "meta.json", name)
    labels = {part: _webp_labels(folder / f"{part}_labels.npy", name, size) for part, size in _SIZES.items()}
    train, test = (_split(_webp_images(folder, part, name), labels[part]) for part in _SIZES)
    return ImageData(name, train, test, classes)


def _webp_classes(path: Path, name: str) -> tuple[str, ...]:
    data = _read(path, name)
    try:
        classes = tuple(json.loads(data)["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {_remedy(name)}.") from error
    if len(classes) != _ARCHIVES[name].num_classes:
        raise DataError(f"{path} names {len(classes)} classes, which is not {name}: {_remedy(name)}.")
    return classes


def _webp_labels(path: Path, name: str, size: int) -> Array:
    data = _read(path, name)
    try:
        labels: Array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {_remedy(name)}.") from error
    if labels.shape != (size,) or labels.dtype != np.uint8 or labels.max() >= _ARCHIVES[name].num_classes:
        raise DataError(f"{path} does not hold {size} labels of {name}: {_remedy(name)}.")
    return labels


def _webp_images(folder: Path, part: str, name: str) -> Array:
    pil = optional_module("PIL.Image", "train")
    images = np.empty((_SIZES[part], 3, 32, 32), dtype=np.uint8)
    for first in range(0, _SIZES[part], _IMAGES_PER_WEBP):
        path = folder / f"{part}-{first // _IMAGES_PER_WEBP:03}.webp"
        data = _read(path, name)
        try:
            stack = pil.open(io.BytesIO(data))
            if stack.size != (32, 32 * _IMAGES_PER_WEBP):
                raise ValueError(f"{stack.size} pixels")
            tiles = np.asarray(stack.convert("RGB")).reshape(-1, 32, 32, 3)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged (not 500 images of 32x32 pixels): {_remedy(name)}.") from error
        images[first : first + _IMAGES_PER_WEBP] = tiles.transpose(0, 3, 1, 2)
    return images
