"""The small protocol: CIFAR-10 averaged to 16x16, ResNet-20, minutes a run on one core, many seeds.

Names: `small-fit-float` and `small-fit-w2a2-lsq`, and the same with `underfit`. Two regimes, because they answer
differently: `fit` has the first 10,000 training images, which the network learns by heart, as in 400 epochs;
`underfit` has all 50,000 and ends long before. In float32, because most CPUs only emulate bf16; with avx512_bf16,
`train.precision=bf16` takes about two thirds of the time.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from qtemper.config import Experiment
from qtemper.data import DataConfig
from qtemper.methods import available, get_method
from qtemper.models import ModelConfig
from qtemper.policy import BitPolicy
from qtemper.train import OptimConfig, TrainConfig

Regime = Literal["fit", "underfit"]
BITS = ("W1A1", "W2A2", "W3A3", "W4A4")
EPOCHS: dict[Regime, tuple[int, int]] = {"fit": (70, 60), "underfit": (15, 20)}
"""Of float training, and of training with quantizers."""


def small(regime: Regime, bits: str | None, method: str | None) -> Experiment:
    """A run of the protocol; without a method, its float network."""
    float_epochs, epochs = EPOCHS[regime]
    optim = OptimConfig(lr=0.1 if method is None else 0.05, weight_decay=5e-4)
    train = TrainConfig(
        epochs=float_epochs if method is None else epochs,
        optim=optim,
        compile=True,
        evaluate_every=5,
        checkpoint_every=5,
        curvature_draws=10,
    )
    return Experiment(
        name=f"small-{regime}-float" if bits is None else f"small-{regime}-{bits.lower()}-{method}",
        data=DataConfig(padding=2, shrink=2, train_images=10_000 if regime == "fit" else 0),
        model=ModelConfig(),
        method=None if method is None else get_method(method),
        policy=BitPolicy() if bits is None else BitPolicy.parse(bits),
        train=train,
    )


def _recipes() -> dict[str, partial[Experiment]]:
    found: dict[str, partial[Experiment]] = {}
    for regime in EPOCHS:
        found[f"small-{regime}-float"] = partial(small, regime, None, None)
        for bits in BITS:
            for method in available():
                found[f"small-{regime}-{bits.lower()}-{method}"] = partial(small, regime, bits, method)
    return found


RECIPES = _recipes()
