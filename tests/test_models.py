from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtemper import data, prepare
from qtemper.data import NORMALIZATIONS, Split
from qtemper.models import ModelConfig, ResNetCifar, SmallConvNet, build
from qtemper.models.resnet_cifar import PadShortcut


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def num_correct(model: nn.Module, split: Split, normalization: str) -> int:
    model.eval()
    with torch.inference_mode():
        batches = data.test_batches(split, 500, *NORMALIZATIONS[normalization])
        return sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "name", "config", "normalization", "correct"),
    [
        ("cifar10_resnet20_akamaster-12fca82f", "cifar10", ModelConfig(), "imagenet", 9173),
        ("cifar10_resnet20_chenyaofo", "cifar10", ModelConfig(shortcut="conv"), "cifar10", 9260),
        (
            "cifar100_resnet20_chenyaofo",
            "cifar100",
            ModelConfig(shortcut="conv", num_classes=100),
            "cifar100",
            6883,
        ),
    ],
)
def test_public_checkpoints_reach_their_accuracy(
    checkpoint: str,
    name: str,
    config: ModelConfig,
    normalization: str,
    correct: int,
    shared_data: Path,
    request: pytest.FixtureRequest,
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = build(config)
    model.load_state_dict(safetensors.load_file(shared_data / "weights" / f"{checkpoint}.safetensors"), strict=True)
    found = num_correct(model, request.getfixturevalue(name).test, normalization)
    assert abs(found - correct) <= 2  # of 10,000: near-ties can turn with another BLAS


# The paper's table 6: 0.27M, 0.46M, 0.66M, 0.85M.
@pytest.mark.parametrize(
    ("arch", "parameters"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)],
)
def test_resnets_have_the_papers_size(arch: Any, parameters: int) -> None:
    model = build(ModelConfig(arch=arch))
    assert num_parameters(model) == parameters
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == int(arch.removeprefix("resnet"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# The paper's 3.5M less the thousand outputs; a stride has no parameters. Ours, counted by hand, layer by layer.
@pytest.mark.parametrize(
    ("arch", "parameters", "depthwise", "side"),
    [("mobilenet_v2_cifar", 2_236_682, 17, 4), ("mobilenet_v2_reduced", 115_242, 7, 8)],
)
def test_mobilenets_for_small_images(arch: Any, parameters: int, depthwise: int, side: int) -> None:
    model = build(ModelConfig(arch=arch))
    assert num_parameters(model) == parameters
    x = torch.zeros(2, 3, 32, 32)
    assert model.features(x).shape[2:] == (side, side)
    assert model(x).shape == (2, 10)
    prepare(model, "pqde", "W4A4")
    grouped = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == depthwise
    assert all(m.weight_quantizer.spec.bits == m.act_quantizer.spec.bits == 4 for m in grouped)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("bn_before_classifier", [True, False])
def test_variants_train(shortcut: Any, bn_before_classifier: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig("resnet20", 7, shortcut, bn_before_classifier, in_channels=2)
    model = build(config)
    model(torch.randn(4, 2, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    keys = model.state_dict().keys()
    assert ("bn2.running_mean" in keys) == bn_before_classifier
    assert ("linear.weight" in keys, "fc.weight" in keys) == (shortcut == "pad", shortcut == "conv")
    assert any("downsample" in key for key in keys) == (shortcut == "conv")


def test_pad_shortcut_equals_its_naive_twin() -> None:
    x = torch.randn(2, 4, 5, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(PadShortcut(added=4)(x), expected)


def test_convolutions_keep_the_variance() -> None:
    torch.manual_seed(0)
    weight = ResNetCifar().layer3[1].conv1.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # 36,864 samples: 0.4% noise


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "resnet-20"}, "unknown arch 'resnet-20'; did you mean 'resnet20'"),
        ({"arch": "vit"}, "known: resnet20, resnet32, resnet44, resnet56, small"),
        ({"shortcut": "C"}, "shortcut must be 'pad' or 'conv', got 'C'"),
    ],
)
def test_bad_config_names_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ModelConfig(**settings))


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_bad_depth(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        ResNetCifar(depth)


def test_setting_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="no effect on arch 'small'"):
        build(ModelConfig(arch="small", bn_before_classifier=True))
    assert isinstance(build(ModelConfig(arch="small", in_channels=1)), SmallConvNet)


@pytest.mark.usefixtures("one_thread")
def test_small_net_learns_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits()
    torch.manual_seed(0)
    model = SmallConvNet()
    num_epochs, mean, std = 10, *NORMALIZATIONS["half"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    for epoch in range(num_epochs):
        batches = data.train_batches(digits.train, 64, seed=0, epoch=epoch, padding=1, flip=False, mean=mean, std=std)
        for x, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        schedule.step()
    assert num_correct(model, digits.test, "half") / len(digits.test) > 0.97
