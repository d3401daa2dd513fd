"""MobileNetV2 on CIFAR: float training, and 4 and 2 bits with every method; PQDE in its progressive stages.

Names: `cifar10-mobilenet_v2_reduced-float` and `cifar10-mobilenet_v2_reduced-w4a4-pqde`, the same with
`mobilenet_v2_cifar` and with `cifar100`; `small-fit-mobilenet-float` and `small-fit-mobilenet-w4a4-pqde` are the
reduced network in the small protocol (see `small.py`). PQDE's own training settings are not public: these are ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

from qtemper.config import Experiment
from qtemper.data import DataConfig
from qtemper.methods import available, get_method
from qtemper.models import ModelConfig
from qtemper.policy import BitPolicy
from qtemper.recipes.small import small
from qtemper.stages import Stage
from qtemper.train import OptimConfig, TrainConfig

DataName = Literal["cifar10", "cifar100"]
Arch = Literal["mobilenet_v2_cifar", "mobilenet_v2_reduced"]
STAGES = {"W4A4": ("W8A8", "W6A6"), "W2A2": ("W8A8", "W6A6", "W4A4")}
"""Of PQDE, above the target."""


def cifar(data: DataName, arch: Arch, bits: str | None, method: str | None) -> Experiment:
    """Float: 200 epochs, SGD 0.1, cosine, weight decay 5e-4. Quantized: 60 epochs at 0.02, stages included."""
    experiment = Experiment(
        name=f"{data}-{arch}-float",
        data=DataConfig(name=data, normalization=data),
        model=ModelConfig(arch=arch, num_classes=10 if data == "cifar10" else 100),
        train=TrainConfig(epochs=200, optim=OptimConfig(lr=0.1, weight_decay=5e-4), compile=True, checkpoint_every=5),
    )
    if bits is None or method is None:
        return experiment
    train = replace(experiment.train, epochs=60, optim=OptimConfig(lr=0.02, weight_decay=1e-4), curvature_draws=10)
    return _progressive(
        replace(
            experiment,
            name=f"{data}-{arch}-{bits.lower()}-{method}",
            method=get_method(method),
            policy=BitPolicy.parse(bits),
            train=train,
        ),
        bits,
    )


def small_fit(bits: str | None, method: str | None) -> Experiment:
    """The reduced network in the small protocol, `fit`."""
    experiment = small("fit", bits, method)
    experiment = replace(
        experiment,
        name=experiment.name.replace("small-fit", "small-fit-mobilenet"),
        model=ModelConfig(arch="mobilenet_v2_reduced"),
    )
    return experiment if bits is None else _progressive(experiment, bits)


def _progressive(experiment: Experiment, bits: str) -> Experiment:
    """PQDE in stages, all of the same length, at no more epochs in total; another method as it is."""
    if experiment.method is None or experiment.method.name != "pqde":
        return experiment
    epochs = experiment.train.epochs // (len(STAGES[bits]) + 1)
    return replace(
        experiment,
        stages=tuple(Stage(name, epochs) for name in STAGES[bits]),
        train=replace(experiment.train, epochs=epochs),
    )


def _recipes() -> dict[str, partial[Experiment]]:
    found: dict[str, partial[Experiment]] = {}
    datasets: tuple[DataName, ...] = ("cifar10", "cifar100")
    archs: tuple[Arch, ...] = ("mobilenet_v2_cifar", "mobilenet_v2_reduced")
    for data in datasets:
        for arch in archs:
            found[f"{data}-{arch}-float"] = partial(cifar, data, arch, None, None)
            for bits in STAGES:
                for method in available():
                    found[f"{data}-{arch}-{bits.lower()}-{method}"] = partial(cifar, data, arch, bits, method)
    found["small-fit-mobilenet-float"] = partial(small_fit, None, None)
    for bits in STAGES:
        for method in available():
            found[f"small-fit-mobilenet-{bits.lower()}-{method}"] = partial(small_fit, bits, method)
    return found


RECIPES = _recipes()
