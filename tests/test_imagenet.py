import csv
import dataclasses
import io
import os
import pickle
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtemper import calibrate, prepare
from qtemper.data import (
    NORMALIZATIONS,
    DataConfig,
    DataError,
    ImageFiles,
    epoch_order,
    load,
    load_imagenet,
    open_source,
)
from qtemper.data.decode import Crop, eval_pixels, random_resized_crop, train_pixels
from qtemper.data.encoded import Encoded, FileSource, ImageError, ImageSource
from qtemper.models import MobileNetV1, ModelConfig, ResNet, build
from qtemper.models.mobilenet import SameConv2d
from qtemper.progress import set_progress

Image = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # torch's advice where there is one core
]

CONFIG = DataConfig("imagenet", "folder", "imagenet", image_size=32, workers=0)
SETTINGS: Any = {"seed": 3, "epoch": 5}

# --- models -------------------------------------------------------------------------------------------------


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


# Every convolution and linear layer has one tensor but the classifier, which has two; every batch norm has five.
@pytest.mark.parametrize(
    ("arch", "parameters", "convolutions", "some"),
    [
        (
            "resnet18",
            11_689_512,
            20,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.1.bn2.running_var": (64,),
                "layer2.0.conv1.weight": (128, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer2.0.downsample.1.num_batches_tracked": (),
                "layer4.1.conv2.weight": (512, 512, 3, 3),
                "fc.weight": (1000, 512),
            },
        ),
        ("resnet34", 21_797_672, 36, {"layer3.5.conv2.weight": (256, 256, 3, 3), "fc.weight": (1000, 512)}),
        (
            "resnet50",
            25_557_032,
            53,
            {
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.2.conv3.weight": (256, 64, 1, 1),
                "layer3.5.bn3.weight": (1024,),
                "layer4.0.conv2.weight": (512, 512, 3, 3),
                "fc.weight": (1000, 2048),
            },
        ),
        (
            "mobilenet_v2",
            3_504_872,
            52,
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.0.1.running_mean": (32,),
                "features.1.conv.0.0.weight": (32, 1, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.1.conv.2.bias": (16,),
                "features.2.conv.0.0.weight": (96, 16, 1, 1),
                "features.2.conv.1.0.weight": (96, 1, 3, 3),
                "features.2.conv.2.weight": (24, 96, 1, 1),
                "features.17.conv.3.weight": (320,),
                "features.18.0.weight": (1280, 320, 1, 1),
                "classifier.1.weight": (1000, 1280),
            },
        ),
    ],
)
def test_keys_and_shapes_are_torchvisions(
    arch: Any, parameters: int, convolutions: int, some: dict[str, tuple[int, ...]]
) -> None:
    model = build(ModelConfig(arch, 1000))
    found = shapes(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(found) == 6 * convolutions + 2
    assert {key: found.get(key) for key in some} == some
    with_stride = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    if arch == "resnet50":
        blocks = [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0")]
        assert with_stride == ["conv1", *blocks]  # v1.5: in the 3x3


def test_mobilenet_v1_has_the_keys_of_its_checkpoint(shared_data: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(shared_data / "weights" / "mobilenet_v1_1.0_224.safetensors")
    assert shapes(MobileNetV1()) == {key: tuple(value.shape) for key, value in weights.items()}
    assert {m.eps for m in MobileNetV1().modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_equals_tensorflows_rule(stride: int) -> None:
    x = torch.randn(1, 2, 10, 8)
    layer = SameConv2d(2, 3, stride)
    pads = []
    for side in (8, 10):
        total = max((-(-side // stride) - 1) * stride + 3 - side, 0)
        pads += [total // 2, total - total // 2]
    assert torch.equal(layer(x), F.conv2d(F.pad(x, pads), layer.weight, stride=stride))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_models_train_with_other_classes_and_channels(arch: Any) -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(arch, 7, in_channels=1))
    logits = model(torch.randn(4, 1, 64, 64))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_models_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="18, 34 or 50, got 101"):
        ResNet(101)
    with pytest.raises(ValueError, match="did you mean 'mobilenet_v2'"):
        build(ModelConfig("mobilenetv2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for ImageNet resnet18, resnet34, resnet50, mobilenet_v1, mobilenet_v2"):
        build(ModelConfig("vit"))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no effect on arch 'mobilenet_v1'"):
        build(ModelConfig("mobilenet_v1", 2, shortcut="conv"))


@pytest.mark.slow
def test_float_mobilenet_v1_reaches_its_accuracy(shared_data: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = MobileNetV1().eval()
    model.load_state_dict(safetensors.load_file(shared_data / "weights" / "mobilenet_v1_1.0_224.safetensors"))
    config = DataConfig("imagenet", "folder", "half", workers=1)
    source = load_imagenet(config, shared_data / "imagenet" / "nips2017")
    assert (source.test_size, len(source.classes), source.classes[:2]) == (1000, 1000, ("tench", "goldfish"))
    correct = 0
    with torch.inference_mode():
        for images, labels in source.test_batches(50):
            correct += int((model(images).argmax(1) == labels).sum())
    assert abs(correct - 765) <= 2  # the README's 76.5%; near-ties can turn with another BLAS or JPEG library


# --- crops --------------------------------------------------------------------------------------------------


def encoded(width: int, height: int, mode: str = "RGB", kind: str = "png") -> Encoded:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return Encoded(buffer.getvalue(), 0, f"an/image.{kind}")


def test_crops_are_within_the_image_and_the_papers_ranges() -> None:
    crops = [random_resized_crop(400, 300, seed=1, epoch=2, index=i) for i in range(3000)]
    for c in crops:
        assert 0 <= c.left <= 400 - c.width
        assert 0 <= c.top <= 300 - c.height
        assert 0.07 < c.width * c.height / 120_000 <= 1.01  # sides are whole pixels
        assert 0.74 < c.width / c.height < 1.35
    assert abs(sum(c.flip for c in crops) - 1500) < 5 * (3000 / 4) ** 0.5
    small = [c for c in crops if c.width < 200 and c.height < 200]
    place = torch.tensor([[c.left / (400 - c.width), c.top / (300 - c.height)] for c in small])
    assert float((place.mean(0) - 0.5).abs().max()) < 5 * (12 * len(small)) ** -0.5  # uniform in [0, 1]
    squares = [random_resized_crop(1000, 1000, seed=1, epoch=0, index=i) for i in range(2000)]
    area = torch.tensor([c.width * c.height / 1e6 for c in squares])
    # Uniform in 0.08 .. 1, but a rectangle that does not fit is drawn again, which thins out those above 3/4.
    assert float((area < 0.41).double().mean()) / float((area < 0.74).double().mean()) == pytest.approx(0.5, abs=0.06)


def test_crops_depend_on_seed_epoch_and_index_alone() -> None:
    draw: Callable[..., Crop] = random_resized_crop
    crops = {draw(400, 300, seed=s, epoch=e, index=i) for s in range(3) for e in range(3) for i in range(3)}
    assert len(crops) == 27
    again = draw(400, 300, seed=1, epoch=1, index=2_000_000)
    assert again == draw(400, 300, seed=1, epoch=1, index=2_000_000)
    assert not any(draw(400, 300, seed=0, epoch=0, index=i, flip=False).flip for i in range(50))


@pytest.mark.parametrize(
    ("size", "crop"),
    [((500, 10), (243, 0, 13, 10)), ((10, 500), (0, 243, 10, 13)), ((1, 1), (0, 0, 1, 1))],
)
def test_a_narrow_image_gets_a_central_crop(size: tuple[int, int], crop: tuple[int, ...]) -> None:
    # Chosen by hand: 4/3 * 10 = 13.3 pixels; at most 1% of the rectangles drawn are this small.
    found = random_resized_crop(*size, seed=0, epoch=0, index=0)
    assert (found.left, found.top, found.width, found.height) == crop


def eval_pixels_of_training_and_evaluation() -> None:
    item = encoded(100, 75)
    image = Image.open(io.BytesIO(item.data))
    crop = next(c for i in range(9) if (c := random_resized_crop(100, 75, seed=0, epoch=0, index=i)).flip)
    index = next(i for i in range(9) if random_resized_crop(100, 75, seed=0, epoch=0, index=i) == crop)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    expected = image.crop(box).resize((56, 56), Image.Resampling.BILINEAR).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = train_pixels(item, 56, seed=0, epoch=0, index=index)
    assert (found.dtype, found.shape) == (torch.uint8, (3, 56, 56))
    assert Image.fromarray(found.permute(1, 2, 0).numpy()).tobytes() == expected.tobytes()
    # 64 pixels on the shorter side (56 * 256 / 224), 85 on the longer; offsets 14.5 -> 14 (to even) and 4.
    expected = image.resize((85, 64), Image.Resampling.BILINEAR).crop((14, 4, 70, 60))
    assert Image.fromarray(eval_pixels(item, 56).permute(1, 2, 0).numpy()).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_kinds_of_pixels_become_rgb(mode: str) -> None:
    kind = "jpeg" if mode == "CMYK" else "png"
    assert eval_pixels(encoded(50, 40, mode, kind), 32).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(90, 90).data[:2000], encoded(90, 90, kind="jpeg").data[:2000], encoded(200, 1).data],
)
def test_a_damaged_image_is_one_sentence(data: bytes) -> None:
    for read in (lambda item: eval_pixels(item, 32), lambda item: train_pixels(item, 32, index=0, **SETTINGS)):
        with pytest.raises(ImageError) as caught:
            read(Encoded(data, 0, "an/image.jpg"))
        message = str(caught.value)
        assert message.startswith("an/image.jpg is ")
        assert "\n" not in message
        assert "skip_limit" in message
        assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it can leave a worker


def test_formats_that_nobody_asked_for_are_not_opened() -> None:
    with pytest.raises(ImageError):
        eval_pixels(encoded(50, 50, kind="bmp"), 32)


# --- sources ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images: three classes with five of them in `train` and two in `val`."""
    root = tmp_path_factory.mktemp("tree")
    paths = iter(sorted((shared_data / "imagenet" / "nips2017").glob("*.webp"))[:21])
    for part, count in (("train", 5), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (root / part / name).mkdir(parents=True)
            for _ in range(count):
                shutil.copy(next(paths), root / part / name)
    return root


@pytest.fixture
def own_tree(tree: Path, tmp_path: Path) -> Path:
    shutil.copytree(tree, tmp_path / "own")
    return tmp_path / "own"


def listed(tree: Path, part: str) -> list[tuple[Path, int]]:
    return [(path, int(path.parent.name[1:]) - 1) for path in sorted((tree / part).glob("*/*"))]


def write_shards(tree: Path, root: Path, per_shard: int = 4) -> Path:
    for part in ("train", "val"):
        files = listed(tree, part)
        for first in range(0, len(files), per_shard):
            with tarfile.open(root / f"x-{part}-{first // per_shard:06}.tar", "w") as shard:
                for path, label in files[first : first + per_shard]:
                    for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.cls", b"%d\n" % label)):
                        info = tarfile.TarInfo(f"./{name}")
                        info.size = len(content)
                        shard.addfile(info, io.BytesIO(content))
    return root


class FakeRows:
    """What is used of `datasets.Dataset` and `IterableDataset`."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None) -> None:
        self.rows = rows
        self.features = {"image": None, "label": SimpleNamespace(names=names)}
        self.info = SimpleNamespace(
            splits={s: SimpleNamespace(num_examples=len(rows)) for s in ("train", "validation")}
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row["label"] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def cast_column(self, column: str, feature: Any) -> "FakeRows":
        assert (column, feature) == ("image", {"decode": False})
        return self

    def shuffle(self, seed: int, buffer_size: int) -> "FakeRows":
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return FakeRows([self.rows[i] for i in order], ["a"])

    def skip(self, n: int) -> "FakeRows":
        return FakeRows(self.rows[n:], ["a"])


def fake_hub(tree: Path, monkeypatch: pytest.MonkeyPatch, names: list[str] | None = None) -> list[tuple[str, bool]]:
    asked = []

    def load_dataset(name: str, *, streaming: bool) -> dict[str, FakeRows]:
        asked.append((name, streaming))
        return {
            split: FakeRows(
                [{"image": {"bytes": p.read_bytes(), "path": p.name}, "label": y} for p, y in listed(tree, part)],
                names,
            )
            for split, part in (("train", "train"), ("validation", "val"), ("test", "val"))
        }

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setattr(module, "Image", dict, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


Pairs = list[tuple[Tensor, Tensor]]


def all_batches(source: ImageFiles) -> Pairs:
    return [*source.train_batches(4, **SETTINGS), *source.test_batches(4)]


def same(a: Pairs, b: Pairs) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True)
    )


def test_all_sources_give_the_same_batches(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = load_imagenet(CONFIG, tree)
    assert (folder.train_size, folder.test_size, folder.classes) == (15, 6, ("n01", "n02", "n03"))
    expected = all_batches(folder)
    shards = load_imagenet(dataclasses.replace(CONFIG, source="webdataset"), write_shards(tree, tmp_path))
    assert shards.classes == ("0", "1", "2")
    assert same(all_batches(shards), expected)
    hub = dataclasses.replace(CONFIG, source="hub")
    asked = fake_hub(tree, monkeypatch)
    assert load_imagenet(hub, tmp_path).classes == ("0", "1", "2")
    assert same(all_batches(load_imagenet(hub)), expected)
    assert asked == [(str(tmp_path), False), ("ILSVRC/imagenet-1k", False)]
    for path in (tree / "train").glob("*/*"):
        assert path.stat().st_size  # nothing was written to


def test_batches_are_what_they_should_be(tree: Path) -> None:
    source = open_source(CONFIG, tree)
    assert isinstance(source, ImageFiles)
    files = listed(tree, "train")
    order = epoch_order(15, **SETTINGS)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZATIONS["imagenet"])
    batches = list(source.train_batches(4, **SETTINGS))
    assert [x.shape for x, _ in batches] == [(4, 3, 32, 32)] * 3  # 15 images: three are left out
    for step, (images, labels) in enumerate(batches):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        for image, label, i in zip(images, labels.tolist(), order[4 * step :].tolist(), strict=False):
            path, expected = files[i]
            assert label == expected
            pixels = train_pixels(Encoded(path.read_bytes(), 0, ""), 32, index=i, **SETTINGS)
            assert torch.equal(image, (pixels.float() / 255 - mean) / std)
    images, labels = map(torch.cat, zip(*source.test_batches(4), strict=True))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    pixels = eval_pixels(Encoded(listed(tree, "val")[5][0].read_bytes(), 0, ""), 32)
    assert torch.equal(images[5], (pixels.float() / 255 - mean) / std)
    sample = source.calibration_batches(4, 2, seed=3)
    assert [x.shape for x in sample] == [(4, 3, 32, 32)] * 2
    path = files[int(epoch_order(15, seed=3, epoch=0)[6])][0]
    assert torch.equal(sample[1][2], (eval_pixels(Encoded(path.read_bytes(), 0, ""), 32).float() / 255 - mean) / std)


def test_flip_and_epoch_have_an_effect(tree: Path) -> None:
    plain = load_imagenet(dataclasses.replace(CONFIG, flip=False), tree)
    flipped = torch.cat([x for x, _ in load_imagenet(CONFIG, tree).train_batches(5, **SETTINGS)])
    straight = torch.cat([x for x, _ in plain.train_batches(5, **SETTINGS)])
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, straight, strict=True)]
    assert 0 < sum(mirrored) < 15
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, straight, strict=True))
    assert not same(list(plain.train_batches(15, seed=3, epoch=6)), list(plain.train_batches(15, **SETTINGS)))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_steps_and_ranks_do_not_matter(workers: int, tree: Path) -> None:
    expected = all_batches(load_imagenet(CONFIG, tree))
    source = load_imagenet(dataclasses.replace(CONFIG, workers=workers), tree)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert same(all_batches(source), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(list(source.train_batches(4, first_step=2, **SETTINGS)), expected[2:3])
    assert list(source.train_batches(4, first_step=3, **SETTINGS)) == []
    ranks = [list(source.train_batches(4, first_step=1, rank=r, world_size=2, **SETTINGS)) for r in range(2)]
    for parts, (images, labels) in zip(zip(*ranks, strict=True), expected[1:3], strict=True):
        assert torch.equal(torch.cat([x for x, _ in parts]), images)
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
    for rank in range(2):
        assert same(list(source.test_batches(4, rank=rank, world_size=2)), expected[3:][rank::2])


def test_bad_batches_are_refused_at_the_call(tree: Path) -> None:
    source = load_imagenet(CONFIG, tree)
    with pytest.raises(ValueError, match="does not divide by 3 processes"):
        source.train_batches(4, world_size=3, **SETTINGS)
    with pytest.raises(ValueError, match="lower it"):
        source.train_batches(16, **SETTINGS)
    with pytest.raises(ValueError, match="first_step must be 0 to 3"):
        source.train_batches(4, first_step=4, **SETTINGS)
    with pytest.raises(ValueError, match="rank must be"):
        source.test_batches(4, rank=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        source.test_batches(0)


def test_hub_stream(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = dataclasses.replace(CONFIG, source="hub")
    fake_hub(tree, monkeypatch, names=["a", "b", "c"])
    source = load_imagenet(hub, streaming=True)
    assert (source.train_size, source.test_size, source.classes) == (15, 6, ("a", "b", "c"))
    assert same(list(source.test_batches(4)), list(load_imagenet(CONFIG, tree).test_batches(4)))
    batches = list(source.train_batches(4, **SETTINGS))
    assert len(batches) == 3
    assert torch.cat([y for _, y in batches]).sort().values.unique().tolist() == [0, 1, 2]
    workers = load_imagenet(dataclasses.replace(hub, workers=2), streaming=True)
    assert same(list(workers.train_batches(4, **SETTINGS)), batches)
    assert same(list(source.train_batches(4, first_step=1, **SETTINGS)), batches[1:])
    assert same(list(source.train_batches(4, rank=1, world_size=2, **SETTINGS)), [(x[2:], y[2:]) for x, y in batches])
    assert not same(list(source.train_batches(4, seed=3, epoch=6)), batches)
    source.train.size = source.train_size = 20  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"imagenet-1k \[train\] ended at image 15 of 20"):
        list(source.train_batches(4, first_step=3, **SETTINGS))


def test_labels_csv(tree: Path, tmp_path: Path, shared_data: Path) -> None:
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label"])
        table.writerows([str(path), label] for path, label in listed(tree, "val"))
    flat = load_imagenet(CONFIG, tmp_path)
    assert (flat.train_size, flat.test_size, flat.classes) == (6, 6, ("0", "1", "2"))
    assert same(list(flat.test_batches(4)), list(load_imagenet(CONFIG, tree).test_batches(4)))
    shutil.copytree(tree / "train", tmp_path / "train")
    both = load_imagenet(CONFIG, tmp_path)
    assert (both.train_size, both.test_size, both.classes) == (15, 6, ("n01", "n02", "n03"))
    (tmp_path / "labels.csv").write_text("file,label\nx.jpg,3\n")
    with pytest.raises(DataError, match="label 3 is not one of 0 to 2"):
        load_imagenet(CONFIG, tmp_path)


@pytest.mark.parametrize("text", ["", "file\nx.jpg\n", "file,label\nx.jpg,cat\n", "file,label\nx.jpg\n"])
def test_a_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_imagenet(CONFIG, tmp_path)


def test_what_is_no_data_set_is_named(own_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data DIR"):
        load_imagenet(CONFIG)
    with pytest.raises(DataError, match="does not hold images"):
        load_imagenet(CONFIG, tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no train shard"):
        load_imagenet(dataclasses.replace(CONFIG, source="webdataset"), own_tree)
    (own_tree / "val" / "n04").mkdir()
    with pytest.raises(DataError, match="n04 is no class"):
        load_imagenet(CONFIG, own_tree)
    shutil.rmtree(own_tree / "val")
    with pytest.raises(DataError, match="does not hold images"):
        load_imagenet(CONFIG, own_tree)
    with pytest.raises(ValueError, match="load_imagenet or open_source"):
        load(CONFIG, own_tree)


def test_damaged_shards_are_named(tree: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, source="webdataset")
    write_shards(tree, tmp_path)
    shard = tmp_path / "x-train-000001.tar"
    content = shard.read_bytes()
    opened = load_imagenet(config, tmp_path)
    for damaged in (content[: len(content) // 2], content[:100], b"", os.urandom(2000)):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match="x-train-000001.tar"):
            load_imagenet(config, tmp_path)
        with pytest.raises(DataError, match=r"x-train-000001.tar:\./\w+\.webp"):
            list(opened.train_batches(15, **SETTINGS))
    with tarfile.open(shard, "w") as archive:
        archive.add(listed(tree, "train")[0][0], "a.webp")
    with pytest.raises(DataError, match=r"a\.webp has no label: add a\.cls"):
        load_imagenet(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "ConnectionError"),
        ({"train": FakeRows([], ["a"])}, "give one with train and validation"),
        ({"train": FakeRows([], None), "test": SimpleNamespace(features={"label": 0})}, "lacks the column image"),
    ],
)
def test_hub_that_does_not_deliver_is_one_sentence(
    change: dict[str, Any], message: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(tree, monkeypatch)

    def load_dataset(name: str, *, streaming: bool) -> Any:
        if None in change.values():
            raise ConnectionError("a page of\ntraceback")
        return change

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(DataError, match=message) as caught:
        load_imagenet(dataclasses.replace(CONFIG, source="hub"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "extra", "source"), [("datasets", "hub", "hub"), ("PIL.Image", "train", "folder")])
def test_missing_package_names_the_extra(
    module: str, extra: str, source: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install qtemper\[{extra}\]"):
        load_imagenet(dataclasses.replace(CONFIG, source=source), tree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "embedded"}, "set it to 'folder' or 'hub' or 'webdataset'"),
        ({"image_size": 0}, "image_size must be 1 or more"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"skip_limit": -1}, "skip_limit must be 0 or more"),
    ],
)
def test_bad_config_names_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


# --- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:900])])
def test_one_damaged_image_ends_in_one_error_with_its_path(
    damage: Callable[[Path], Any], workers: int, own_tree: Path
) -> None:
    source = load_imagenet(dataclasses.replace(CONFIG, workers=workers), own_tree)
    path = listed(own_tree, "train")[7][0]
    damage(path)  # after the files were listed
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(source.train_batches(5, **SETTINGS))
    assert time.monotonic() - start < 20
    assert str(caught.value).startswith(f"{path} is ")
    assert "\n" not in str(caught.value)
    assert len(list(source.test_batches(4))) == 2  # the other images are still there


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_and_reported(workers: int, own_tree: Path) -> None:
    config = dataclasses.replace(CONFIG, workers=workers, skip_limit=2)
    whole = torch.cat([x for x, _ in load_imagenet(CONFIG, own_tree).train_batches(5, **SETTINGS)])
    source = load_imagenet(config, own_tree)
    paths = [path for path, _ in listed(own_tree, "train")]
    paths[7].unlink()
    paths[8].write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped") as caught:
        batches = list(source.train_batches(5, **SETTINGS))
    skipped = [words[1] for w in caught if (words := str(w.message).split())[0] == "skipped:"]
    assert sorted(skipped) == [str(paths[7]), str(paths[8])]
    slot = {i: s for s, i in enumerate(epoch_order(15, **SETTINGS).tolist())}
    images = torch.cat([x for x, _ in batches])
    for i in range(15):
        assert torch.equal(images[slot[i]], whole[slot[9 if i in (7, 8) else i]])
    assert same(list(source.train_batches(5, **SETTINGS)), batches)  # and not reported again
    assert same(list(source.train_batches(5, first_step=2, **SETTINGS)), batches[2:])
    paths[14].unlink()
    with pytest.raises(DataError, match=r"2 others were skipped") as error:
        list(source.train_batches(5, **SETTINGS))
    assert str(error.value).startswith(str(paths[14]))


def test_a_stream_replaces_within_the_batch(own_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(own_tree, "val")[1][0].write_bytes(b"x")
    fake_hub(own_tree, monkeypatch, names=["a", "b", "c"])
    source = load_imagenet(dataclasses.replace(CONFIG, source="hub", skip_limit=1), streaming=True)
    with pytest.warns(UserWarning, match=r"\[validation\] image 1 \(\w+\.webp\) is damaged"):
        (images, labels), _ = source.test_batches(4)
    assert labels.tolist() == [0, 1, 1, 1]
    assert torch.equal(images[1], images[2])


class DeadlySource(ImageSource):
    """Reading its image 9 kills the process, as the kernel does when memory runs out."""

    def __init__(self, files: FileSource) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Encoded:
        if index == 9:
            time.sleep(0.5)  # the calling process waits by now
            os.kill(os.getpid(), signal.SIGKILL)
        return self.files.read(index)


def test_a_killed_worker_ends_in_one_error(tree: Path) -> None:
    files = FileSource(listed(tree, "train"))
    source = ImageFiles("x", ("a", "b", "c"), DeadlySource(files), files, image_size=32, workers=2)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"decoding process died.*data\.workers") as caught:
        list(source.train_batches(5, **SETTINGS))
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)


class BrokenSource(ImageSource):
    def __len__(self) -> int:
        return 5

    def read(self, index: int) -> Encoded:
        raise RuntimeError("a mistake in a source")


def test_a_mistake_in_a_source_is_not_taken_for_a_dead_worker() -> None:
    source = ImageFiles("x", ("a",), BrokenSource(), BrokenSource(), workers=1)
    with pytest.raises(RuntimeError, match="a mistake in a source"):
        list(source.test_batches(5))


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_two_steps_of_tempering(arch: Any, tree: Path) -> None:
    source = load_imagenet(dataclasses.replace(CONFIG, image_size=64, workers=1), tree)
    torch.manual_seed(0)
    model = prepare(build(ModelConfig(arch, 3)), "tempering", "W4A4")
    calibrate(model, source.calibration_batches(5, 1, seed=0), observer="lsq")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, (images, labels) in enumerate(source.train_batches(7, seed=0, epoch=0)):
        set_progress(model, step / 2)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert step == 1
