"""WebDataset shards: tar archives in which `name.jpg` and `name.cls` are an image and its label.

The layout of https://github.com/webdataset/webdataset; the reader is our own, since an index by member lets a run
shuffle all images and resume anywhere, which reading shards as streams does not.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import final

from qtemper.data.encoded import SUFFIXES, Encoded, ImageError, ImageSource, class_names, numbered_classes, unreadable
from qtemper.data.images import DataError


@final
class TarSource(ImageSource):
    """Images of tar shards, in the order of the shards and of their members.

    Every shard's headers are read once, here: for shards on a disk, not on a network. Compressed shards are refused.

    Args:
        shards: the archives.

    Raises:
        DataError: if a shard is damaged, or an image has no label.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards
        self.members = [(number, *member) for number, shard in enumerate(shards) for member in _index(shard)]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def labels(self) -> list[int]:
        """Label of every image."""
        return [label for *_, label in self.members]

    def read(self, index: int) -> Encoded:
        """See `ImageSource`."""
        number, name, offset, size, label = self.members[index]
        path = f"{self.shards[number]}:{name}"
        try:
            with self.shards[number].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(data) < size:
            raise ImageError(path, "cut off (the shard is shorter than when it was opened)")
        return Encoded(data, label, path)


def webdataset_sources(root: Path) -> tuple[TarSource, TarSource, tuple[str, ...]]:
    """Training images, test images and class names of the shards in and below `root`.

    A shard with "train" in its path below `root` is for training, with "val" or "test" for testing; other shards are
    not used. Class names come from `imagenet_classes.json`, else they are the numbers.

    Raises:
        DataError: if either part is missing, or a shard is damaged.
    """
    paths = sorted(root.rglob("*.tar"))
    names = [path.relative_to(root).as_posix() for path in paths]
    train = [path for path, name in zip(paths, names, strict=True) if "train" in name]
    test = [
        path
        for path, name in zip(paths, names, strict=True)
        if path not in set(train) and ("val" in name or "test" in name)
    ]
    for part, shards in (("train", train), ("val", test)):
        if not shards:
            raise DataError(f"{root} holds no {part} shard: name them like {root / f'{part}-000000.tar'}.")
    sources = TarSource(train), TarSource(test)
    for shards, source in zip((train, test), sources, strict=True):
        if not len(source):
            raise DataError(f"{shards[0]} holds no image with a label: an image is name.jpg, its label name.cls.")
    classes = numbered_classes(class_names(root), [label for source in sources for label in source.labels])
    return *sources, classes


def _index(shard: Path) -> list[tuple[str, int, int, int]]:
    """(name, offset, size, label) of every image, in bytes from the beginning of the shard."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        # "r:" because a compressed archive has no offsets.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                # The key ends at the first dot of the file name, as WebDataset has it.
                folder, slash, file = member.name.rpartition("/")
                key, _, suffix = file.partition(".")
                key = folder + slash + key
                if f".{suffix.lower()}" in SUFFIXES and member.isfile():
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == "cls" and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    labels[key] = int(content.read(32))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{shard} is missing, damaged or compressed ({error}): restore it as a plain tar.") from error
    for key in images:
        if key not in labels:
            raise DataError(f"{shard}:{images[key][0]} has no label: add {key}.cls to the shard.")
    return [(*image, labels[key]) for key, image in images.items()]
