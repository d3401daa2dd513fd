"""scikit-learn's digits: the demo. Trains its own float network, then quantizes it; minutes on a laptop."""

from __future__ import annotations

from qtemper.config import CalibrationConfig, Experiment
from qtemper.data import DataConfig
from qtemper.methods.tempering import NoiseTempering
from qtemper.models import ModelConfig
from qtemper.policy import BitPolicy
from qtemper.train import OptimConfig, TrainConfig


def digits_w2a2_tempering() -> Experiment:
    """Float for 15 epochs, then W2A2 with noise tempering for 25."""
    return Experiment(
        name="digits-w2a2-tempering",
        data=DataConfig(name="digits", source="embedded", normalization="half", padding=1, flip=False),
        model=ModelConfig(arch="small", in_channels=1),
        method=NoiseTempering(),
        policy=BitPolicy(2, 2),
        calibration=CalibrationConfig(batches=2),
        float_train=TrainConfig(epochs=15, batch_size=32, optim=OptimConfig(lr=0.05), log_every=10),
        train=TrainConfig(epochs=25, batch_size=32, optim=OptimConfig(lr=0.02, quantizer_lr=0.02), log_every=10),
    )


RECIPES = {"digits-w2a2-tempering": digits_w2a2_tempering}
