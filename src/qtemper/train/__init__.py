"""The training engine: `fit`, its configuration, checkpoints."""

from qtemper.train.accuracy import evaluate
from qtemper.train.config import TrainConfig
from qtemper.train.engine import fit, train_step
from qtemper.train.metrics import DivergedError
from qtemper.train.optim import LossConfig, OptimConfig
from qtemper.train.processes import ProcessLostError
from qtemper.train.signals import TrainingInterrupted

__all__ = [
    "DivergedError",
    "LossConfig",
    "OptimConfig",
    "ProcessLostError",
    "TrainConfig",
    "TrainingInterrupted",
    "evaluate",
    "fit",
    "train_step",
]
