"""`fit`: train a network, float or prepared, on images that lie in memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtemper.curvature import update_curvature
from qtemper.data import NORMALIZATIONS, DataConfig, ImageData, Split, test_batches, train_batches
from qtemper.progress import set_progress
from qtemper.quantizer import quantizers
from qtemper.train.allocator import keep_memory
from qtemper.train.metrics import DivergedError, MetricsLog, RunningMetrics
from qtemper.train.optim import Loss, LossConfig, OptimConfig, build_loss, build_optimizers, set_learning_rate
from qtemper.train.progress import Display
from qtemper.train.signals import TrainingInterrupted, stop_on_signal
from qtemper.train.state import TrainState, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per optimizer step; an epoch's incomplete last batch is dropped.
        optim: optimizers and schedule.
        loss: label smoothing and distillation.
        precision: `float32`, or `bf16` for autocast. Evaluation is always float32.
        channels_last: memory format of images and weights.
        compile: compile the training step's forward and backward with torch.compile.
        evaluate_every: test accuracy every so many epochs (and after the last); 0 for the end only.
        checkpoint_every: a checkpoint every so many epochs (and after the last).
        log_every: optimizer steps between two lines of metrics.jsonl.
        tensorboard: the same numbers for TensorBoard, too (extra `tensorboard`).
        curvature_every: epochs between Hessian estimates, for methods that ask for them; 0 for never.
        curvature_batches: batches per estimate.
        curvature_draws: Hutchinson draws per batch, at most.
    """

    epochs: int = 15
    batch_size: int = 128
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    evaluate_every: int = 1
    checkpoint_every: int = 1
    log_every: int = 50
    tensorboard: bool = False
    curvature_every: int = 10
    curvature_batches: int = 3
    curvature_draws: int = 50

    def __post_init__(self) -> None:
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


def train_step(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    optimizers: list[torch.optim.Optimizer],
    autocast: contextlib.AbstractContextManager[Any],
    clip: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss and the number of correct predictions, both still on the device."""
    with autocast:
        logits = model(images)
    logits = logits.float()
    value = loss(logits, labels, images)
    for optimizer in optimizers:
        optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    if clip is not None:
        clip()
    for optimizer in optimizers:
        optimizer.step()
    return value.detach(), (logits.detach().argmax(dim=1) == labels).sum()


def fit(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    data_config: DataConfig,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
    title: str = "train",
) -> list[dict[str, Any]]:
    """Train a model in place.

    Args:
        model: a float model, or a prepared and calibrated one.
        data: images in memory; they are moved to the model's device.
        config: how to train.
        data_config: normalisation and augmentation.
        seed: of the order of images and their augmentation.
        out: directory for `metrics.jsonl` and `checkpoints/`; None writes nothing.
        resume: continue from the newest sound checkpoint in `out`.
        teacher: float model for distillation.
        title: leads the progress bar.

    Returns:
        Metrics by epoch.

    Raises:
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint.
        DivergedError: the loss is not finite.
        CheckpointError: nothing to resume from, or a checkpoint cannot be written.
    """
    keep_memory()
    device = next(model.parameters()).device
    data = data.to(device)
    steps = len(data.train) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size {config.batch_size} is more than the {len(data.train)} images; lower it.")
    if resume and out is None:
        raise ValueError("resume needs the directory that holds the checkpoints: set out.")
    total = steps * config.epochs
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(device).eval()
    loss = build_loss(config.loss, teacher)
    state = TrainState(
        model, build_optimizers(model, config.optim), config_hash=_config_hash(config, data_config, seed)
    )
    log = MetricsLog(out, tensorboard=config.tensorboard)
    if resume and out is not None:
        for line in load_checkpoint(out / "checkpoints", state):
            print(line)
        log.truncate(state.step)
    _advance(model, state.step, total)
    forward = torch.compile(model, fullgraph=True) if config.compile else model
    batches = _Batches(data, config, data_config, seed)
    with (
        Display(config.epochs, steps, config.batch_size, state.step, title) as display,
        stop_on_signal() as stopped,
    ):
        for epoch in range(state.step // steps, config.epochs):
            _train_epoch(epoch, state, forward, loss, batches, config, display, log, stopped, out)
            _finish_epoch(epoch, state, loss, batches, config, display, log)
            due = (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs
            path = _checkpoint(state, out) if due or stopped else None
            if stopped:
                raise TrainingInterrupted(stopped[0], state.step, path)
    return state.history


class _Batches:
    """Normalised batches of an epoch, on the device."""

    def __init__(self, data: ImageData, config: TrainConfig, data_config: DataConfig, seed: int) -> None:
        self.data, self.seed = data, seed
        self.batch_size, self.data_config = config.batch_size, data_config
        self.mean, self.std = NORMALIZATIONS[data_config.normalization]
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in train_batches(
            self.data.train,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            first_step=first_step,
            padding=self.data_config.padding,
            flip=self.data_config.flip,
            mean=self.mean,
            std=self.std,
        ):
            yield images.contiguous(memory_format=self.format), labels


def _train_epoch(
    epoch: int,
    state: TrainState,
    forward: Callable[[Tensor], Tensor],
    loss: Loss,
    batches: _Batches,
    config: TrainConfig,
    display: Display,
    log: MetricsLog,
    stopped: list[int],
    out: Path | None,
) -> None:
    state.model.train()
    device = next(state.model.parameters()).device
    steps = len(batches.data.train) // config.batch_size
    clip = _clipping(state.model, config.optim.clip_norm)
    running = RunningMetrics(config.batch_size, state.totals)
    for images, labels in batches.train(epoch, state.step % steps):
        progress = state.step / (steps * config.epochs)
        set_learning_rate(state.optimizers, config.optim.schedule(progress))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        running.add(*train_step(forward, images, labels, loss, state.optimizers, autocast, clip))
        state.step += 1
        _advance(state.model, state.step, steps * config.epochs)
        if state.step % config.log_every == 0 or state.step % steps == 0:
            value, top1 = running.take(state.step)
            heat = temperature(state.model)
            rate = state.optimizers[0].param_groups[0]["lr"]
            log.write(step=state.step, loss=value, top1=top1, temperature=heat, lr=rate)
            display.step(state.step, value, top1, heat)
        if stopped and running.recent:
            running.take(state.step)  # a checkpoint keeps the epoch's sums
        # After an epoch's last step `fit` stops, when the epoch is evaluated and in the history.
        if stopped and state.step % steps:
            raise TrainingInterrupted(stopped[0], state.step, _checkpoint(state, out))
    state.history.append({"epoch": epoch + 1, "step": state.step, **running.epoch(state.step)})


def _checkpoint(state: TrainState, out: Path | None) -> Path | None:
    """Write a checkpoint where there is a directory for it, but none that diverged: resuming it would be in vain."""
    if out is None:
        return None
    if not all(bool(torch.isfinite(p).all()) for p in state.model.parameters()):
        raise DivergedError(
            f"the weights became NaN or infinite by step {state.step}; lower optim.lr or optim.quantizer_lr, or set "
            "optim.clip_norm. Earlier checkpoints are sound."
        )
    return save_checkpoint(out / "checkpoints", state)


def _finish_epoch(
    epoch: int,
    state: TrainState,
    loss: Loss,
    batches: _Batches,
    config: TrainConfig,
    display: Display,
    log: MetricsLog,
) -> None:
    last = epoch + 1 == config.epochs
    due = last or (config.evaluate_every > 0 and (epoch + 1) % config.evaluate_every == 0)
    metrics = state.history[-1]
    metrics["test_top1"] = None
    if due:
        metrics["test_top1"] = evaluate(state.model, batches.data.test, batches.data_config)
    metrics["temperature"] = temperature(state.model)
    metrics["images_per_second"] = round(display.images_per_second(state.step), 1)
    log.write(**metrics)
    display.epoch(metrics)
    if config.curvature_every and (epoch + 1) % config.curvature_every == 0 and not last:
        sample = [batch for batch, _ in zip(batches.train(epoch + 1), range(config.curvature_batches), strict=False)]
        update_curvature(
            state.model,
            sample,
            lambda model, batch: loss(model(batch[0]), batch[1], batch[0]),
            max_draws=config.curvature_draws,
            seed=batches.seed + epoch,
        )


def evaluate(model: nn.Module, split: Split, data_config: DataConfig, *, batch_size: int = 500) -> float:
    """Top-1 accuracy in percent, in eval mode and float32; the model's mode is kept."""
    mean, std = NORMALIZATIONS[data_config.normalization]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for images, labels in test_batches(split.to(device), batch_size, mean, std):
            correct += (model(images).argmax(dim=1) == labels).sum()
    model.train(was_training)
    return 100.0 * int(correct) / len(split)


def temperature(model: nn.Module) -> float | None:
    """The highest temperature of the model's quantizers, or None where none has any."""
    found = [
        float(t) for _, q in quantizers(model) if isinstance(t := getattr(q.rounding, "temperature", None), Tensor)
    ]
    return max(found) if found else None


def _advance(model: nn.Module, step: int, total: int) -> None:
    if any(True for _ in quantizers(model)):
        set_progress(model, step / total)


def _clipping(model: nn.Module, norm: float) -> Callable[[], None] | None:
    if norm == 0:
        return None
    parameters = list(model.parameters())

    def clip() -> None:
        nn.utils.clip_grad_norm_(parameters, norm)

    return clip


def _config_hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
