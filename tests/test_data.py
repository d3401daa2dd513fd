import hashlib
import io
import lzma
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from qtemper import data
from qtemper.counter import counter_uniform, derive_key
from qtemper.data import DataConfig, DataError, ImageData, Split, cifar, images

# --- batches ------------------------------------------------------------------------------------------------


def random_images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_split(n: int) -> Split:
    return Split(random_images(n, 3, 8, 8), torch.arange(n))


def naive_augment(batch: Tensor, index: Tensor, *, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """One image after the other: draw, put on black, cut out, mirror."""

    def uniform(stream: int, i: int) -> float:
        key = torch.tensor(derive_key(stream, seed, epoch), dtype=torch.int32)
        return float(counter_uniform(torch.tensor(i, dtype=torch.int32), key))

    out = []
    for image, i in zip(batch.numpy(), index.tolist(), strict=True):
        _, height, width = image.shape
        top = int(uniform(images._CROP_ROW, i) * (2 * padding + 1))
        left = int(uniform(images._CROP_COLUMN, i) * (2 * padding + 1))
        black = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        crop = black[:, top : top + height, left : left + width]
        out.append(crop[:, :, ::-1] if flip and uniform(images._FLIP, i) < 0.5 else crop)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 5, 7)])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_augment_equals_its_naive_twin(shape: tuple[int, ...], padding: int, flip: bool) -> None:
    batch, index = random_images(40, *shape), torch.randperm(50_000)[:40]
    settings: Any = {"seed": 3, "epoch": 7, "padding": padding, "flip": flip}
    out = data.augment(batch, index, **settings)
    assert out.dtype == torch.uint8
    assert torch.equal(out, naive_augment(batch, index, **settings))


def test_crop_does_not_depend_on_the_batch() -> None:
    batch, index = random_images(30, 3, 32, 32), torch.arange(100, 130)
    whole = data.augment(batch, index, seed=1, epoch=2)
    some = torch.tensor([29, 4, 11])
    assert torch.equal(data.augment(batch[some], index[some], seed=1, epoch=2), whole[some])
    assert not torch.equal(data.augment(batch, index, seed=1, epoch=3), whole)
    assert not torch.equal(data.augment(batch, index, seed=2, epoch=2), whole)


def test_crops_and_flips_are_uniform_and_independent() -> None:
    n = 20_000
    index = torch.arange(n)
    rows = torch.arange(1, 10, dtype=torch.uint8)
    coordinates = torch.stack([rows[:, None].expand(9, 9), rows.expand(9, 9)]).expand(n, 2, 9, 9)
    centre = data.augment(coordinates, index, seed=0, epoch=0)[:, :, 4, 4].to(torch.int64) - 1
    flipped = data.augment(coordinates, index, seed=0, epoch=0, padding=0)[:, 1, 0, 0] == 9
    cells = torch.bincount(centre[:, 0] * 18 + centre[:, 1] * 2 + flipped, minlength=162).double()
    chi2 = float(((cells - n / 162) ** 2 / (n / 162)).sum())
    assert chi2 < 161 + 5 * (2 * 161) ** 0.5  # five standard deviations above the mean of chi2 with 161 dof


def test_normalize() -> None:
    batch = random_images(4, 3, 5, 5)
    mean, std = data.NORMALIZATIONS["cifar10"]
    out = data.normalize(batch, mean, std)
    expected = (batch.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)  # a few roundings of values below 3
    assert torch.equal(data.normalize(batch, (0.5,), (0.5,)).aminmax().max, batch.max() / 127.5 - 1)
    with pytest.raises(ValueError, match="half"):
        data.normalize(random_images(4, 1, 8, 8), mean, std)


def test_epoch_order_is_a_pure_function() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = data.epoch_order(1000, seed=5, epoch=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, data.epoch_order(1000, seed=5, epoch=1))
    assert not torch.equal(order, data.epoch_order(1000, seed=5, epoch=2))
    assert not torch.equal(order, data.epoch_order(1000, seed=6, epoch=1))


SETTINGS: Any = {"seed": 1, "epoch": 4, "mean": (0.5,), "std": (0.5,)}


def test_train_batches_are_full_shuffled_and_augmented() -> None:
    split = random_split(70)
    batches = list(data.train_batches(split, 16, padding=2, **SETTINGS))
    assert [len(labels) for _, labels in batches] == [16] * 4
    index = torch.cat([labels for _, labels in batches])
    assert torch.equal(index, data.epoch_order(70, seed=1, epoch=4)[:64])
    expected = data.augment(split.images[index], index, seed=1, epoch=4, padding=2)
    assert torch.equal(torch.cat([x for x, _ in batches]), data.normalize(expected, (0.5,), (0.5,)))


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_an_epoch_can_start_in_the_middle(first_step: int) -> None:
    split = random_split(70)
    whole = list(data.train_batches(split, 16, **SETTINGS))
    rest = list(data.train_batches(split, 16, first_step=first_step, **SETTINGS))
    assert len(rest) == 4 - first_step
    for (x, y), (x_whole, y_whole) in zip(rest, whole[first_step:], strict=True):
        assert torch.equal(x, x_whole)
        assert torch.equal(y, y_whole)


def test_bad_batches_are_refused_at_the_call() -> None:
    split = random_split(10)
    with pytest.raises(ValueError, match="lower it"):
        data.train_batches(split, 11, **SETTINGS)
    with pytest.raises(ValueError, match="first_step must be 0 to 2"):
        data.train_batches(split, 5, first_step=3, **SETTINGS)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data.train_batches(split, 0, **SETTINGS)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data.test_batches(split, 0, (0.5,), (0.5,))


def test_test_batches_keep_order_and_remainder() -> None:
    split = random_split(10)
    batches = list(data.test_batches(split, 4, (0.5,), (0.5,)))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), data.normalize(split.images, (0.5,), (0.5,)))


# --- CIFAR --------------------------------------------------------------------------------------------------


def check_one_sentence(error: Exception, *mentions: object) -> None:
    message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    for mention in (*mentions, cifar.HOMEPAGE):
        assert str(mention) in message


def same_data(a: ImageData, b: ImageData) -> bool:
    pairs = [(a.train, b.train), (a.test, b.test)]
    equal = all(torch.equal(p.images, q.images) and torch.equal(p.labels, q.labels) for p, q in pairs)
    return equal and (a.name, a.classes) == (b.name, b.classes)


def test_cifar_is_complete(cifar10: ImageData, cifar100: ImageData) -> None:
    for loaded, num_classes in ((cifar10, 10), (cifar100, 100)):
        for split, n in ((loaded.train, 50_000), (loaded.test, 10_000)):
            assert len(split) == n
            assert split.images.shape == (n, 3, 32, 32)
            assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
            assert torch.equal(split.labels.bincount(), torch.full((num_classes,), n // num_classes))
        assert len(loaded.classes) == num_classes
    assert cifar10.classes[6] == "frog"  # the first image of the training set
    assert int(cifar10.train.labels[0]) == 6
    mean = cifar10.train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean.tolist(), list(data.NORMALIZATIONS["cifar10"][0]), rtol=0, atol=5e-5)


def python2_pickle(fields: dict[str, Any]) -> bytes:
    """Protocol 2 as Python 2's cPickle wrote it, to the bit (it memoizes only some objects)."""
    noted = 0

    def note() -> bytes:
        nonlocal noted
        noted += 1
        return b"q" + bytes([noted]) if noted < 256 else b"r" + noted.to_bytes(4, "little")

    def string(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode() + note()

    def array(x: np.ndarray) -> bytes:
        out = b"cnumpy.core.multiarray\n_reconstruct\n" + note() + b"cnumpy\nndarray\n" + note()
        out += b"K\0\x85U\x01b\x87R" + note() + b"(K\x01M" + x.shape[0].to_bytes(2, "little") + b"M\0\x0c\x86"
        out += b"cnumpy\ndtype\n" + note() + b"U\x02u1K\0K\x01\x87R" + note() + b"(K\x03U\x01|NNN"
        minus_one = b"J" + b"\xff" * 4
        return out + minus_one * 2 + b"K\0tb\x89T" + x.nbytes.to_bytes(4, "little") + x.tobytes() + b"tb"

    def value(x: Any) -> bytes:
        if isinstance(x, str):
            return string(x)
        if isinstance(x, np.ndarray):
            return array(x)
        out = b"]" + note()
        for first in range(0, len(x), 1000):
            chunk = x[first : first + 1000]
            out += b"(" + b"".join(string(i) if isinstance(i, str) else b"K" + bytes([i]) for i in chunk) + b"e"
        return out

    out = b"\x80\x02}" + note() + b"("
    for key, content in fields.items():
        out += string(key) + value(content)
    return out + b"u."


def write_official(folder: Path, loaded: ImageData, source: Path) -> None:
    """The official files of `loaded`; what it does not keep (file names, coarse labels) is in `source`."""
    folder.mkdir()
    names = lzma.decompress((source / "filenames.txt.xz").read_bytes()).decode().split("\n")
    pixels = {"train": loaded.train.images.flatten(1).numpy(), "test": loaded.test.images.flatten(1).numpy()}
    labels = {"train": loaded.train.labels.tolist(), "test": loaded.test.labels.tolist()}
    filenames = {"train": names[:50_000], "test": names[50_000:60_000]}
    label = "{}ing batch {} of {}".format
    if loaded.name == "cifar100":
        shutil.copy(source / "meta", folder)
        for part in ("train", "test"):
            coarse = np.load(source / f"{part}_coarse_labels.npy").tolist()
            fields = {
                "filenames": filenames[part],
                "batch_label": label(part, 1, 1),
                "fine_labels": labels[part],
            }
            fields |= {"coarse_labels": coarse, "data": pixels[part]}
            (folder / part).write_bytes(python2_pickle(fields))
        return
    shutil.copy(source / "batches.meta", folder)
    for part, number, count in [*(("train", i, 5) for i in range(1, 6)), ("test", 1, 1)]:
        rows = slice((number - 1) * 10_000, number * 10_000)
        fields = {"batch_label": label(part, number, count), "labels": labels[part][rows]}
        fields |= {"data": pixels[part][rows], "filenames": filenames[part][rows]}
        (folder / (f"data_batch_{number}" if part == "train" else "test_batch")).write_bytes(python2_pickle(fields))


@pytest.fixture
def emptied_path(tmp_path: Path) -> Iterator[Path]:
    """`tmp_path` for hundreds of megabytes, which pytest would keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_layouts_hold_the_same(
    name: str, shared_data: Path, emptied_path: Path, request: pytest.FixtureRequest
) -> None:
    webp = request.getfixturevalue(name)
    folder = emptied_path / cifar._ARCHIVES[name].folder
    write_official(folder, webp, shared_data / name)  # wrong by one bit, and its md5 is refused
    assert same_data(data.load_cifar(emptied_path, name), webp)
    assert same_data(data.load_cifar(folder, name), webp)


def test_a_missing_root_is_one_sentence(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        for name in ("cifar10", "cifar100"):
            with pytest.raises(DataError) as caught:
                data.load_cifar(root, name)
            check_one_sentence(caught.value, root, cifar._ARCHIVES[name].folder)


def test_the_other_cifar_is_refused(shared_data: Path) -> None:
    with pytest.raises(DataError, match="names 10 classes, which is not cifar100"):
        data.load_cifar(shared_data / "cifar10", "cifar100")
    with pytest.raises(ValueError, match="'cifar10' or 'cifar100', got 'cifar'"):
        data.load_cifar(shared_data, "cifar")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def webp(width: int, height: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("RGB", (width, height)).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-000.webp", lambda _: b"not an image"),
        ("train-000.webp", lambda original: original[: len(original) // 2]),
        ("train-000.webp", lambda _: webp(32, 32)),
        ("train-000.webp", lambda _: webp(16_000, 32)),
        ("train-001.webp", None),
        ("train_labels.npy", lambda original: original[:1000]),
        ("train_labels.npy", lambda original: original[:4]),
        ("train_labels.npy", lambda original: original[:20] + b"?" + original[21:]),
        ("train_labels.npy", lambda _: b"PK\x03\x04 not numpy"),
        ("train_labels.npy", lambda _: npy(np.zeros(10, np.uint8))),
        ("train_labels.npy", lambda _: npy(np.full(50_000, 10, np.uint8))),
        ("train_labels.npy", lambda _: npy(np.full(50_000, {}, object))),
        ("test_labels.npy", None),
        ("meta.json", lambda _: b"{"),
        ("meta.json", lambda _: b"[]"),
        ("meta.json", lambda _: b'{"classes": ["frog"]}'),
        ("meta.json", None),
    ],
)
def test_damaged_webp_layout_is_one_sentence(
    file: str, damage: Callable[[bytes], bytes] | None, shared_data: Path, tmp_path: Path
) -> None:
    for path in (shared_data / "cifar10").iterdir():
        (tmp_path / path.name).symlink_to(path)
    original = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if damage is not None:
        (tmp_path / file).write_bytes(damage(original))
    with pytest.raises(DataError) as caught:
        data.load_cifar(tmp_path, "cifar10")
    check_one_sentence(caught.value, tmp_path / file)


class Hostile:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_official_layout_refuses_what_is_not_the_official_file(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "cifar10" / "batches.meta", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Hostile(tmp_path / "touched")}, protocol=2))
    with pytest.raises(DataError, match="md5") as caught:
        data.load_cifar(tmp_path, "cifar10")
    check_one_sentence(caught.value, tmp_path / "data_batch_1")
    (tmp_path / "data_batch_1").rename(tmp_path / "data_batch_2")
    with pytest.raises(DataError, match="missing") as caught:
        data.load_cifar(tmp_path, "cifar10")
    check_one_sentence(caught.value, tmp_path / "data_batch_1")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_executes_nothing(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = tmp_path / "touched"
    content = pickle.dumps({b"data": Hostile(touched)}, protocol=protocol)
    pickle.loads(content)
    assert touched.exists()  # it is hostile
    touched.unlink()
    (tmp_path / "meta").write_bytes(content)
    monkeypatch.setitem(cifar._ARCHIVES["cifar100"].md5, "meta", hashlib.md5(content).hexdigest())
    with pytest.raises(DataError, match="no image file needs") as caught:
        data.load_cifar(tmp_path, "cifar100")
    check_one_sentence(caught.value, tmp_path / "meta")
    assert not touched.exists()


def test_the_unpickler_builds_only_bytes() -> None:
    array = python2_pickle({"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)})
    content = cifar._Unpickler(io.BytesIO(array), encoding="bytes").load()
    assert np.array_equal(content[b"data"].reshape(-1), np.arange(2 * 3072, dtype=np.uint8))
    objects = array.replace(b"U\x02u1", b"U\x02O8")
    with pytest.raises(pickle.UnpicklingError, match="not of bytes"):
        cifar._Unpickler(io.BytesIO(objects), encoding="bytes").load()


class FakeDataset(dict[str, Any]):
    features: ClassVar = {name: SimpleNamespace(names=["cat", "dog"]) for name in ("label", "fine_label")}


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[[str], Any]) -> None:
    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(("name", "column"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_hub(name: str, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = random_images(3, 32, 32, 3).numpy()
    asked = []

    def load_dataset(repository: str) -> dict[str, FakeDataset]:
        asked.append(repository)
        part = FakeDataset({"img": [image.fromarray(x) for x in pixels], column: [1, 0, 1]})
        return {"train": part, "test": part}

    fake_hub(monkeypatch, load_dataset)
    loaded = data.load(DataConfig(name=name, source="hub"))  # type: ignore[arg-type]
    assert asked == [f"uoft-cs/{name}"]
    assert loaded.classes == ("cat", "dog")
    for split in (loaded.train, loaded.test):
        assert torch.equal(split.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert torch.equal(split.labels, torch.tensor([1, 0, 1]))


def test_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repository: str) -> Any:
        raise ConnectionError("a page of\ntraceback")

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(DataError) as caught:
        data.load_cifar_hub("cifar10")
    check_one_sentence(caught.value, "uoft-cs/cifar10", "ConnectionError", "source='folder'")


# --- digits, configuration, optional packages ---------------------------------------------------------------


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = data.load(DataConfig(name="digits", source="embedded", normalization="half"))
    original = datasets.load_digits()
    assert (len(loaded.train), len(loaded.test)) == (1438, 359)
    assert loaded.test.images.shape == (359, 1, 8, 8)
    assert int(loaded.train.images.max()) == 255
    assert loaded.classes == tuple("0123456789")
    assert torch.equal(loaded.test.labels, torch.from_numpy(original.target[4::5]))
    exact = torch.from_numpy(original.images[4::5]) * 255 / 16
    assert float((loaded.test.images[:, 0] - exact).abs().max()) <= 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar11"}, "did you mean 'cifar10'"),
        ({"name": "digits"}, "digits cannot come from source 'folder'; set it to 'embedded'"),
        ({"source": "embedded"}, "set it to 'folder' or 'hub'"),
        ({"normalization": "cifar"}, "unknown normalization 'cifar'; did you mean 'cifar10'"),
        ({"padding": -1}, "padding must be 0 or more"),
    ],
)
def test_bad_config_names_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_folder_must_be_named(shared_data: Path, cifar10: ImageData) -> None:
    with pytest.raises(DataError, match="--data DIR"):
        data.load(DataConfig())
    assert same_data(data.load(DataConfig(), shared_data), cifar10)


@pytest.mark.parametrize(
    ("module", "extra", "load"),
    [
        ("datasets", "hub", lambda _: data.load_cifar_hub("cifar10")),
        ("sklearn.datasets", "train", lambda _: data.load_digits()),
        ("PIL.Image", "train", lambda root: data.load_cifar(root, "cifar10")),
    ],
)
def test_missing_package_names_the_extra(
    module: str, extra: str, load: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install qtemper\[{extra}\]"):
        load(shared_data)


def test_data_moves_as_a_whole() -> None:
    loaded = ImageData("x", random_split(4), random_split(2), ("a",)).to("meta")
    assert {t.device.type for s in (loaded.train, loaded.test) for t in (s.images, s.labels)} == {"meta"}


# --- fewer and smaller images -------------------------------------------------------------------------------


def test_shrunk_pixels_are_means_of_squares():
    split = random_split(5)
    small = images.shrink(split, 2)
    assert small.images.shape == (5, 3, 4, 4)
    square = split.images[3, 1, 2:4, 6:8].float().mean().round()
    assert small.images[3, 1, 1, 3] == square
    assert torch.equal(small.labels, split.labels)
    assert images.shrink(split, 1) is split
    with pytest.raises(ValueError, match="divisor"):
        images.shrink(split, 3)


def test_digits_can_be_cut_and_shrunk():
    source = data.open_source(DataConfig("digits", "embedded", "half", shrink=2, train_images=100))
    pixels, _ = next(iter(source.train_batches(10, seed=0, epoch=0)))
    assert pixels.shape == (10, 1, 4, 4)
    assert source.train_size == 100
    with pytest.raises(ValueError, match="train_images"):
        data.open_source(DataConfig("digits", "embedded", "half", train_images=10_000))
    with pytest.raises(ValueError, match="in memory"):
        DataConfig("imagenet", normalization="imagenet", shrink=2)
