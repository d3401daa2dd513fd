"""What a person sees while a network trains: a live bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress of one training; a context manager.

    Args:
        num_epochs: of the training.
        steps_per_epoch: optimizer steps an epoch.
        batch_size: images a step.
        first_step: steps done before (on resume).
        title: leads the bar.
        quiet: show nothing (all processes but the first).
    """

    def __init__(
        self,
        num_epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        first_step: int = 0,
        title: str = "train",
        quiet: bool = False,
    ) -> None:
        self.console = Console(quiet=quiet)
        self.num_epochs, self.steps_per_epoch, self.batch_size = num_epochs, steps_per_epoch, batch_size
        self.first_step = first_step
        self.started = time.monotonic()
        self.progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=4),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            total = num_epochs * steps_per_epoch
            self.task = self.progress.add_task(title, total=total, completed=first_step, status="")

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def images_per_second(self, step: int) -> float:
        """Mean rate since the start."""
        return (step - self.first_step) * self.batch_size / max(time.monotonic() - self.started, 1e-9)

    def step(self, step: int, loss: float, top1: float, temperature: float | None) -> None:
        """Move the bar to `step` optimizer steps done."""
        if self.progress is None:
            return
        heat = "" if temperature is None else f" T {temperature:.2f}"
        status = (
            f"epoch {min(step // self.steps_per_epoch + 1, self.num_epochs)}/{self.num_epochs} step {step} "
            f"loss {loss:.2f} top-1 {top1:.1f}{heat} {self.images_per_second(step):,.0f} img/s"
        )
        self.progress.update(self.task, completed=step, status=status)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """One line for a finished epoch."""
        heat = "" if metrics["temperature"] is None else f"  T {metrics['temperature']:.3f}"
        test = "" if metrics["test_top1"] is None else f"  test {metrics['test_top1']:.2f}%"
        line = (
            f"epoch {metrics['epoch']}/{self.num_epochs}  loss {metrics['train_loss']:.4f}  "
            f"train {metrics['train_top1']:.2f}%{test}{heat}  {metrics['images_per_second']:,.0f} img/s"
        )
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)
