"""Optimizers, learning-rate schedules and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtemper.errors import check_choices
from qtemper.prepare import param_groups
from qtemper.schedules import Cosine, Schedule

OptimizerName = Literal["sgd", "adam"]


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move.

    Attributes:
        optimizer: `sgd` or `adam`, for weights, biases and batch norm.
        lr: their initial learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty in the gradient; never applied to quantizer parameters.
        quantizer_optimizer: `sgd`, `adam`, or `same` as the weights'.
        quantizer_lr: initial learning rate of quantizer parameters.
        schedule: factor on both learning rates over progress.
        clip_norm: largest norm of the gradient, or 0 for no clipping.
    """

    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    quantizer_optimizer: OptimizerName | Literal["same"] = "same"
    quantizer_lr: float = 0.01
    schedule: Schedule = Cosine()
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("lr", "quantizer_lr", "weight_decay", "momentum", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """One optimizer, or two where quantizer parameters have their own kind."""
    groups = param_groups(model, lr=config.lr, weight_decay=config.weight_decay, quantizer_lr=config.quantizer_lr)
    for group in groups:
        group["initial_lr"] = group["lr"]
    second = config.quantizer_optimizer
    if second in ("same", config.optimizer) or len(groups) == 1:
        return [_build(config.optimizer, groups, config)]
    return [_build(config.optimizer, groups[:1], config), _build(second, groups[1:], config)]


def _build(name: str, groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.Adam(groups, lr=config.lr)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to its initial rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
        label_smoothing: of the cross entropy.
        distillation: weight in [0, 1] of the float model's soft labels (Hinton et al., arXiv 1503.02531); 0 is off.
        distillation_temperature: softmax temperature of both, and its square a factor on that term.
    """

    label_smoothing: float = 0.0
    distillation: float = 0.0
    distillation_temperature: float = 4.0

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, got {self.distillation_temperature}.")


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss(logits, labels, images)`, a scalar."""


def build_loss(config: LossConfig, teacher: Callable[[Tensor], Tensor] | None) -> Loss:
    """Cross entropy, mixed with the teacher's soft labels where asked for.

    Raises:
        ValueError: distillation without a teacher.
    """
    alpha, temperature = config.distillation, config.distillation_temperature
    if alpha > 0 and teacher is None:
        raise ValueError("distillation needs a float teacher; train from a float checkpoint or set distillation=0.")

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        hard = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if alpha == 0 or teacher is None:
            return hard
        with torch.no_grad():
            soft = F.log_softmax(teacher(images).float() / temperature, dim=1)
        own = F.log_softmax(logits / temperature, dim=1)
        return (1 - alpha) * hard + alpha * temperature**2 * F.kl_div(own, soft, reduction="batchmean", log_target=True)

    return loss
