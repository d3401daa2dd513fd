"""How a network is trained, field by field; optimizers and loss are in optim.py."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

from qtemper.errors import ConfigError, check_choices
from qtemper.train.optim import LossConfig, OptimConfig

MAX_TIMEOUT = 1e6
"""Seconds, of `TrainConfig.timeout`; torch's own counters overflow at very large ones."""


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per optimizer step; an epoch's incomplete last batch is dropped.
        optim: optimizers and schedule.
        loss: label smoothing and distillation.
        precision: `float32`, or `bf16` for autocast. Evaluation is always float32, which for convolutions on a GPU is
            TF32 unless `torch.backends.cudnn.allow_tf32` is False.
        channels_last: memory format of images and weights.
        compile: compile the training step's forward and backward with torch.compile; on a CPU it needs a C++ compiler.
        cuda_graphs: with `compile`, on one GPU: record the kernels of a step once and replay them as CUDA graphs, so
            that a small network does not wait for each to be started. Untried on a GPU so far.
        evaluate_every: test accuracy every so many epochs (and after the last); 0 for the end only.
        checkpoint_every: a checkpoint every so many epochs (and after the last).
        log_every: optimizer steps between two lines of metrics.jsonl.
        tensorboard: the same numbers for TensorBoard, too (extra `tensorboard`).
        curvature_every: epochs between Hessian estimates, for methods that ask for them; 0 for never.
        curvature_batches: batches per estimate.
        curvature_draws: Hutchinson draws per batch, at most.
        on_nonfinite: what a NaN or infinite loss or gradient does, in the step where it appears or, on an accelerator,
            the one after: `stop`, or `rollback` to the last checkpoint and go on at half the learning rate, three times
            at most.
        sync_batch_norm: with several processes, batch norm over the whole batch instead of each one's part.
        timeout: with several processes, seconds after which one that does not answer ends the training.
    """

    epochs: int = 15
    batch_size: int = 128
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = field(default=False, repr=False)  # no other result, so that a checkpoint goes on under either
    evaluate_every: int = 1
    checkpoint_every: int = 1
    log_every: int = 50
    tensorboard: bool = False
    curvature_every: int = 10
    curvature_batches: int = 3
    curvature_draws: int = 50
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    sync_batch_norm: bool = False
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "epochs",
            "batch_size",
            "checkpoint_every",
            "log_every",
            "curvature_batches",
            "curvature_draws",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("evaluate_every", "curvature_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 1 <= self.timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout must be 1 to {MAX_TIMEOUT:.0f} seconds, got {self.timeout}.")


def require_compiler(config: TrainConfig, name: str = "train") -> None:
    """Say before a training begins what torch.compile would say in its first step, at length.

    Args:
        config: what is to be trained.
        name: of the field that holds it, for the message.

    Raises:
        ConfigError: `config.compile`, and no C++ compiler that torch would find.
    """
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    installs = os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") == "1"  # torch fetches one where there is none
    if config.compile and not (torch.cuda.is_available() or installs) and shutil.which(compiler) is None:
        raise ConfigError(
            f"{name}.compile needs a C++ compiler, and there is no {compiler}: install one (CXX names another), or "
            f"--set {name}.compile=false."
        )
