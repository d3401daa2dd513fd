"""CIFAR-10 and CIFAR-100 ResNet-20: float training, a short recipe and EWGS's published one for every method.

Names: `cifar10-resnet20-float`, `cifar10-resnet20-w2a2-tempering` (15 epochs from a float checkpoint) and
`cifar10-resnet20-w2a2-tempering-400ep` (EWGS's recipe); bits are w1a1, w2a2, w3a3, w4a4, w1a32.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from qtemper.config import CalibrationConfig, Experiment
from qtemper.data import DataConfig
from qtemper.methods import available, get_method
from qtemper.models import ModelConfig
from qtemper.policy import BitPolicy
from qtemper.train import OptimConfig, TrainConfig

DataName = Literal["cifar10", "cifar100"]
BITS = ("W1A1", "W2A2", "W3A3", "W4A4", "W1A32")


def float_training(data: DataName) -> Experiment:
    """EWGS's float network: 400 epochs, SGD 0.1, cosine, weight decay 1e-4, batch 256, BN before the head."""
    return Experiment(
        name=f"{data}-resnet20-float",
        data=DataConfig(name=data, normalization=data),
        model=_ewgs_model(data),
        train=TrainConfig(
            epochs=400, batch_size=256, optim=OptimConfig(lr=0.1, weight_decay=1e-4), checkpoint_every=10
        ),
    )


def short(data: DataName, bits: str, method: str) -> Experiment:
    """15 epochs from a public float checkpoint; on CIFAR-10 the paper's ResNet-20 with its own normalisation."""
    public = (
        {"shortcut": "pad", "normalization": "imagenet"}
        if data == "cifar10"
        else {"shortcut": "conv", "normalization": "cifar100"}
    )
    return Experiment(
        name=f"{data}-resnet20-{bits.lower()}-{method}",
        data=DataConfig(name=data, normalization=public["normalization"]),
        model=ModelConfig(
            num_classes=10 if data == "cifar10" else 100,
            shortcut="pad" if public["shortcut"] == "pad" else "conv",
        ),
        method=get_method(method),
        policy=BitPolicy.parse(bits),
        calibration=CalibrationConfig(),
        train=TrainConfig(
            epochs=15,
            batch_size=128,
            optim=OptimConfig(lr=0.04, weight_decay=1e-4, quantizer_lr=0.01),
            compile=True,
            curvature_every=3,
            curvature_draws=10,
        ),
    )


def ewgs(data: DataName, bits: str, method: str) -> Experiment:
    """EWGS's published recipe: 400 epochs, batch 256, Adam 1e-3, quantizers Adam 1e-5, cosine, BN before the head.

    EWGS itself also has its own bounds and initialisation.
    """
    own = method == "ewgs"
    return Experiment(
        name=f"{data}-resnet20-{bits.lower()}-{method}-400ep",
        data=DataConfig(name=data, normalization=data),
        model=_ewgs_model(data),
        method=get_method("ewgs", grid_kind="bounds") if own else get_method(method),
        policy=BitPolicy.parse(bits),
        calibration=CalibrationConfig(observer="ewgs" if own else "mse"),
        train=TrainConfig(
            epochs=400,
            batch_size=256,
            optim=OptimConfig(optimizer="adam", lr=1e-3, weight_decay=1e-4, quantizer_lr=1e-5),
            compile=True,
            evaluate_every=10,
            checkpoint_every=2,
        ),
    )


def _ewgs_model(data: DataName) -> ModelConfig:
    return ModelConfig(num_classes=10 if data == "cifar10" else 100, bn_before_classifier=True)


def _recipes() -> dict[str, partial[Experiment]]:
    found: dict[str, partial[Experiment]] = {}
    datasets: tuple[DataName, ...] = ("cifar10", "cifar100")
    for data in datasets:
        found[f"{data}-resnet20-float"] = partial(float_training, data)
        for bits in BITS:
            for method in available():
                name = f"{data}-resnet20-{bits.lower()}-{method}"
                found[name] = partial(short, data, bits, method)
                found[f"{name}-400ep"] = partial(ewgs, data, bits, method)
    return found


RECIPES = _recipes()
