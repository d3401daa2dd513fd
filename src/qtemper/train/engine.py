"""`fit`: train a network, float or prepared, on batches of images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qtemper.curvature import update_curvature
from qtemper.data.images import batch_share
from qtemper.data.source import Source
from qtemper.errors import CheckpointError
from qtemper.fast import cached_compilation, prepare_compiler
from qtemper.progress import set_progress, temperature
from qtemper.quantizer import quantizers
from qtemper.train.accuracy import evaluate
from qtemper.train.allocator import keep_memory
from qtemper.train.config import TrainConfig, require_compiler
from qtemper.train.display import Display
from qtemper.train.metrics import DivergedError, MetricsLog, RunningMetrics
from qtemper.train.optim import Loss, build_loss, build_optimizers, set_learning_rate
from qtemper.train.processes import (
    Agreement,
    add_up_statistics,
    make_fabric,
    report_lost_process,
    share_buffers,
    share_noise,
    synchronize_batch_norm,
)
from qtemper.train.signals import TrainingInterrupted, stop_on_signal
from qtemper.train.snapshot import TrainState
from qtemper.train.state import holds_checkpoints, load_checkpoint, save_checkpoint

MAX_ROLLBACKS = 3
"""Rollbacks after which a training that still diverges is given up."""


def train_step(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    optimizers: list[torch.optim.Optimizer],
    autocast: contextlib.AbstractContextManager[Any],
    check: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss and the number of correct predictions, both still on the device.

    `check` sees the loss when the gradients are there and before any parameter moves; it may raise to prevent that.
    """
    for optimizer in optimizers:  # before the forward pass, whose memory the old gradients would add to
        optimizer.zero_grad()
    with autocast:
        logits = model(images)
    logits = logits.float()
    value = loss(logits, labels, images)
    value.backward()  # type: ignore[no-untyped-call]
    check(value.detach())
    for optimizer in optimizers:
        optimizer.step()
    return value.detach(), (logits.detach().argmax(dim=1) == labels).sum()


def fit(
    model: nn.Module,
    source: Source,
    config: TrainConfig,
    *,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
    fabric: Fabric | None = None,
    title: str = "train",
) -> list[dict[str, Any]]:
    """Train a model in place.

    Args:
        model: a float model, or a prepared and calibrated one.
        source: batches of images.
        config: how to train.
        seed: of the order of images and their augmentation.
        out: directory for `metrics.jsonl` and `checkpoints/`; None writes nothing.
        resume: continue from the newest sound checkpoint in `out`.
        teacher: float model for distillation.
        fabric: the processes to train on; those that torchrun started, or this one alone, if not given.
        title: leads the progress bar.

    Returns:
        Metrics by epoch.

    Raises:
        ValueError: fewer images than a batch has; no compiler where there is to be one; `resume` without `out`.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint.
        DivergedError: a loss or gradient is not finite, and `on_nonfinite` is `stop` or rollbacks did not help. On a
            CPU no parameter has moved by it; an accelerator is one step ahead.
        CheckpointError: nothing to resume from; `out` has checkpoints and `resume` is not set; or one cannot be
            written.
        ProcessLostError: another process died or did not answer in time.
    """
    if config.batch_size > source.train_size:
        raise ValueError(f"batch_size {config.batch_size} is more than the {source.train_size} images; lower it.")
    require_compiler(config)
    if resume and out is None:
        raise ValueError("resume needs the directory that holds the checkpoints: set out.")
    if out is not None and not resume and holds_checkpoints(out / "checkpoints"):
        raise CheckpointError(
            f"{out} holds the checkpoints of a training; continue it with resume=True, or choose another directory."
        )
    keep_memory()
    with report_lost_process(config.timeout):
        trainer = _Trainer(model, source, config, seed, out, teacher, fabric or make_fabric(timeout=config.timeout))
        return trainer.run(resume, title)


class _Trainer:
    """What the parts of one training share."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        config: TrainConfig,
        seed: int,
        out: Path | None,
        teacher: nn.Module | None,
        fabric: Fabric,
    ) -> None:
        self.source, self.config, self.seed, self.out, self.fabric = source, config, seed, out, fabric
        batch_share(config.batch_size, fabric.world_size)
        self.steps = source.train_size // config.batch_size
        self.total = self.steps * config.epochs
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(fabric.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.sync_batch_norm and fabric.world_size > 1:
            synchronize_batch_norm(model)
        share_noise(model, fabric.global_rank)
        if teacher is not None:
            teacher.to(fabric.device).eval()
        self.loss = build_loss(config.loss, teacher)
        plain = {"source": source.name, "seed": seed, "train": json.loads(json.dumps(dataclasses.asdict(config)))}
        self.state = TrainState(
            model,
            build_optimizers(model, config.optim),
            config_hash=hashlib.sha256(repr((config, source.name, seed)).encode()).hexdigest(),
            config=plain,
            world_size=fabric.world_size,
        )
        self.running = RunningMetrics(config.batch_size, self.state.totals)
        self.log = MetricsLog(out if fabric.is_global_zero else None, tensorboard=config.tensorboard)
        self.broken, self.stop = Agreement(fabric), Agreement(fabric)
        self.rollbacks = 0

    def run(self, resume: bool, title: str) -> list[dict[str, Any]]:
        """Train to the end."""
        config, state = self.config, self.state
        if resume:
            self.restore()
        else:
            self.log.truncate(0)
        self.advance()
        compiled = self.compiled(state.model) if config.compile else state.model
        self.forward: Callable[[Tensor], Tensor] = compiled
        if self.fabric.world_size > 1:
            assert isinstance(compiled, nn.Module)
            # Fabric would compile the wrapper anew, with its graph breaks; the network inside is compiled already.
            self.forward = self.fabric.setup_module(compiled, move_to_device=False, _reapply_compile=False)
        self.display = Display(
            config.epochs, self.steps, config.batch_size, state.step, title, quiet=not self.fabric.is_global_zero
        )
        asking = any(q.rounding.wants_curvature for _, q in quantizers(state.model))
        if asking and not 0 < config.curvature_every < config.epochs:
            self.display.say(
                "The method's delta is set from the Hessian, which this training never measures: set "
                "train.curvature_every to fewer than its epochs."
            )
        with self.display, cached_compilation(), stop_on_signal() as self.stopped:
            while state.step < self.total:
                try:
                    self.epoch()
                except DivergedError as error:
                    self.roll_back(error)
        return state.history

    def compiled(self, model: nn.Module) -> Any:
        """The network through torch.compile, and through CUDA graphs where there can be any."""
        if self.fabric.device.type == "cpu" and self.fabric.local_rank == 0:
            prepare_compiler()
        graphs = self.config.cuda_graphs and self.fabric.device.type == "cuda" and self.fabric.world_size == 1
        return torch.compile(model, fullgraph=True, mode="reduce-overhead" if graphs else None)

    def epoch(self) -> None:
        """The rest of the epoch under way, its evaluation and checkpoint."""
        state, config = self.state, self.config
        epoch = state.step // self.steps
        state.model.train()
        for images, labels in self.batches(epoch, state.step % self.steps):
            self.step(images, labels)
            signum = self.stop_signal()
            # After an epoch's last step, stop when the epoch is evaluated and in the history.
            if signum and state.step % self.steps:
                self.running.take(state.step, self.fabric)  # a checkpoint keeps the epoch's sums
                raise TrainingInterrupted(signum, state.step, self.checkpoint())
        self.refuse(self.broken.settle())
        state.history.append({"epoch": epoch + 1, "step": state.step, **self.running.epoch(state.step, self.fabric)})
        self.finish_epoch(epoch)
        signum = self.stop_signal() or int(self.stop.settle())  # there may be no step any more that would say it
        due = (epoch + 1) % config.checkpoint_every == 0 or state.step == self.total
        path = self.checkpoint() if due or signum else None
        if signum:
            raise TrainingInterrupted(signum, state.step, path)

    def stop_signal(self) -> int:
        """The signal that any process has received, or 0: all stop in the same step."""
        received = self.stopped[0] if self.stopped else 0
        if self.fabric.world_size == 1:
            return received
        return int(self.stop.ask(torch.full((), float(received), device=self.fabric.device)))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step and what is reported of it."""
        state, config = self.state, self.config
        set_learning_rate(state.optimizers, config.optim.schedule(state.step / self.total) * state.lr_factor)
        device = self.fabric.device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")
        self.running.add(*train_step(self.forward, images, labels, self.loss, state.optimizers, autocast, self.check))
        state.step += 1
        self.advance()
        if state.step % config.log_every == 0 or state.step % self.steps == 0:
            value, top1 = self.running.take(state.step, self.fabric)
            heat = temperature(state.model)
            rate = state.optimizers[0].param_groups[0]["lr"]
            self.log.write(step=state.step, loss=value, top1=top1, temperature=heat, lr=rate)
            self.display.step(state.step, value, top1, heat)

    def check(self, value: Tensor) -> None:
        """Clip the gradient; on all processes refuse a step whose loss or gradient is not finite on one."""
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.refuse(self.broken.ask(torch.isfinite(value + norm).logical_not().float()))
        if self.config.optim.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)

    def refuse(self, broken: float) -> None:
        """Raise where a step, this one or the one before, is not finite."""
        if broken:
            step = self.state.step if self.broken.late else self.state.step + 1
            raise DivergedError(
                f"the loss or a gradient is NaN or infinite in step {step}; lower optim.lr or "
                "optim.quantizer_lr, set optim.clip_norm, or set on_nonfinite=rollback."
            )

    def finish_epoch(self, epoch: int) -> None:
        """Test accuracy, one line of metrics, and the Hessian for methods that ask for it."""
        state, config = self.state, self.config
        share_buffers(state.model, self.fabric)
        last = state.step == self.total
        due = last or (config.evaluate_every > 0 and (epoch + 1) % config.evaluate_every == 0)
        metrics = state.history[-1]
        metrics["test_top1"] = evaluate(state.model, self.source, fabric=self.fabric) if due else None
        metrics["temperature"] = temperature(state.model)
        metrics["images_per_second"] = round(self.display.images_per_second(state.step), 1)
        self.log.write(**metrics)
        self.display.epoch(metrics)
        if config.curvature_every and (epoch + 1) % config.curvature_every == 0 and not last:
            whole = self.source.train_batches(config.batch_size, seed=self.seed, epoch=epoch + 1)
            sample = [self.to_device(batch) for batch, _ in zip(whole, range(config.curvature_batches), strict=False)]
            update_curvature(
                state.model,
                sample,
                lambda model, batch: self.loss(model(batch[0]), batch[1], batch[0]),
                max_draws=config.curvature_draws,
                seed=self.seed + epoch,
            )

    def batches(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of an epoch's batches, on the device."""
        fabric = self.fabric
        for batch in self.source.train_batches(
            self.config.batch_size,
            seed=self.seed,
            epoch=epoch,
            first_step=first_step,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            yield self.to_device(batch)

    def to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Images in the memory format of the network, and labels."""
        images, labels = (t.to(self.fabric.device, non_blocking=True) for t in batch)
        return images.contiguous(memory_format=self.format), labels

    def advance(self) -> None:
        """Add up the step's statistics and tell the quantizers how far training is."""
        if any(True for _ in quantizers(self.state.model)):
            add_up_statistics(self.state.model, self.fabric)
            set_progress(self.state.model, self.state.step / self.total)

    def checkpoint(self) -> Path | None:
        """Write a checkpoint where there is a directory for it, but none that diverged."""
        self.refuse(self.broken.settle())
        if self.out is None:
            return None
        path = None
        if not torch.stack([torch.isfinite(p).all() for p in self.state.model.parameters()]).all():
            raise DivergedError(
                f"the weights became NaN or infinite in step {self.state.step}; lower optim.lr or optim.quantizer_lr, "
                "or set optim.clip_norm. Earlier checkpoints are sound."
            )
        if self.fabric.is_global_zero:
            path = save_checkpoint(self.out / "checkpoints", self.state)
        self.fabric.barrier()
        return path

    def restore(self) -> None:
        """Go back to the newest sound checkpoint."""
        assert self.out is not None
        for line in load_checkpoint(self.out / "checkpoints", self.state):
            if self.fabric.is_global_zero:
                print(line)
        self.log.truncate(self.state.step)

    def roll_back(self, error: DivergedError) -> None:
        """Return to the last checkpoint at half the learning rate, or give up."""
        saved = self.out is not None and holds_checkpoints(self.out / "checkpoints")
        if self.config.on_nonfinite == "stop" or not saved or self.rollbacks == MAX_ROLLBACKS:
            raise error
        self.rollbacks += 1
        self.running.recent.clear()
        self.broken.settle()
        for optimizer in self.state.optimizers:
            optimizer.zero_grad()
        factor = self.state.lr_factor / 2
        self.restore()
        self.state.lr_factor = factor
        self.advance()
        self.log.write(step=self.state.step, event="rollback", lr_factor=factor)
        self.display.say(f"{error} Rolled back to step {self.state.step}, learning rate halved.")
