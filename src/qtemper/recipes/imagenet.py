"""ImageNet: EWGS's and LSQ's published recipes for every method, for one machine or several.

Names: `imagenet-resnet18-w4a4-tempering` is EWGS's recipe (100 epochs, synchronised batch norm, first and last layer
float), `imagenet-resnet18-w4a4-tempering-90ep` is LSQ's (90 epochs, first and last layer at 8 bits). The batch of 256
is that of all processes together: `torchrun --nproc-per-node N -m qtemper.cli train ...` shares it out, on one machine
or, with `--nnodes`, on several.
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

Arch = Literal["resnet18", "resnet34", "resnet50", "mobilenet_v2"]
ARCHS: tuple[Arch, ...] = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
BITS = ("W1A1", "W2A2", "W3A3", "W4A4", "W1A32")

LSQ_WEIGHT_DECAY = {1: 0.25e-4, 2: 0.25e-4, 3: 0.5e-4, 4: 1e-4}
"""LSQ's weight decay by bits; the paper has no 1-bit row, which takes the 2-bit one's."""


def ewgs(arch: Arch, bits: str, method: str) -> Experiment:
    """EWGS's: 100 epochs, SGD 0.01 and Adam 1e-5 for quantizers, cosine, weight decay 1e-4, SyncBN.

    EWGS itself also has its own bounds and initialisation. Its Hessian is measured on 10 batches of the training's
    size, not of 16 images as theirs: a larger batch's gradient has less noise, so delta of the weights is larger.
    """
    own = method == "ewgs"
    return Experiment(
        name=f"imagenet-{arch}-{bits.lower()}-{method}",
        data=DataConfig(name="imagenet", normalization="imagenet", workers=8),
        model=ModelConfig(arch=arch, num_classes=1000),
        method=get_method("ewgs", grid_kind="bounds") if own else get_method(method),
        policy=BitPolicy.parse(bits),
        calibration=CalibrationConfig(observer="ewgs" if own else "mse", batches=8, batch_size=64),
        train=TrainConfig(
            epochs=100,
            batch_size=256,
            optim=OptimConfig(lr=1e-2, weight_decay=1e-4, quantizer_optimizer="adam", quantizer_lr=1e-5),
            sync_batch_norm=True,
            curvature_every=1,
            curvature_batches=10,
        ),
    )


def lsq(arch: Arch, bits: str, method: str) -> Experiment:
    """LSQ's: 90 epochs, SGD 0.01 for everything, cosine, weight decay by bits, LSQ's own initial step."""
    parsed = BitPolicy.parse(bits)
    return Experiment(
        name=f"imagenet-{arch}-{bits.lower()}-{method}-90ep",
        data=DataConfig(name="imagenet", normalization="imagenet", workers=8),
        model=ModelConfig(arch=arch, num_classes=1000),
        method=get_method(method),
        policy=BitPolicy(parsed.weight, parsed.activation, "8bit"),
        calibration=CalibrationConfig(observer="lsq", batches=1, batch_size=256, batch_norm=False),
        train=TrainConfig(
            epochs=90,
            batch_size=256,
            optim=OptimConfig(lr=1e-2, weight_decay=LSQ_WEIGHT_DECAY[parsed.weight], quantizer_lr=1e-2),
        ),
    )


RECIPES: dict[str, partial[Experiment]] = {}
for _arch in ARCHS:
    for _bits in BITS:
        for _method in available():
            RECIPES[f"imagenet-{_arch}-{_bits.lower()}-{_method}"] = partial(ewgs, _arch, _bits, _method)
            RECIPES[f"imagenet-{_arch}-{_bits.lower()}-{_method}-90ep"] = partial(lsq, _arch, _bits, _method)
