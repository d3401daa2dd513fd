"""The training engine: `fit`, its configuration, checkpoints."""

from qtemper.train.engine import DivergedError, TrainConfig, TrainingInterrupted, evaluate, fit, train_step
from qtemper.train.optim import LossConfig, OptimConfig

__all__ = [
    "DivergedError",
    "LossConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainingInterrupted",
    "evaluate",
    "fit",
    "train_step",
]
