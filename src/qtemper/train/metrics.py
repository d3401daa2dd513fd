"""What a training reports: running loss and accuracy, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from qtemper.errors import CheckpointError
from qtemper.files import write_atomically
from qtemper.train.processes import total


class DivergedError(RuntimeError):
    """The loss or a gradient is not finite; nothing of that is in a checkpoint."""


DIVERGED_EXIT = 3
"""Exit code of a command whose training diverged: its settings were sound, and the outcome is a result."""


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line. Without a directory it swallows everything.

    Args:
        directory: the run's.
        tensorboard: write every number to TensorBoard, too, under `directory/tensorboard`.
    """

    def __init__(self, directory: Path | None, *, tensorboard: bool = False) -> None:
        self.path = None if directory is None else directory / "metrics.jsonl"
        self.board: Any = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self.board = _tensorboard(directory / "tensorboard") if tensorboard else None

    def write(self, **values: Any) -> None:
        """Append a line; `step` is among the values."""
        if self.path is not None:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write {self.path}: {error.strerror or error}; make room, then continue with --resume."
                ) from None
        if self.board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, values["step"])
            self.board.flush()

    def truncate(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        if self.path is not None and self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            kept = "".join(line for line in lines if self._step(line) <= step)
            write_atomically(self.path, kept.encode())

    @staticmethod
    def _step(line: str) -> float:
        """The step of a line; infinite for one that a crash left half-written."""
        try:
            return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
        except (ValueError, TypeError, KeyError):
            return math.inf


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError(
            "train.tensorboard needs tensorboard: pip install 'qtemper[tensorboard]'", name="tensorboard"
        ) from None
    return SummaryWriter(str(directory))


class RunningMetrics:
    """Loss and accuracy since the last report and over the epoch, summed on the device.

    Args:
        batch_size: images a step.
        totals: sums of the epoch (loss, correct predictions, steps), which a checkpoint keeps.
    """

    def __init__(self, batch_size: int, totals: list[float]) -> None:
        self.batch_size = batch_size
        self.recent: list[tuple[Tensor, Tensor]] = []
        self.totals = totals

    def add(self, loss: Tensor, correct: Tensor) -> None:
        """Take one step's loss and number of correct predictions, without waiting for the device."""
        self.recent.append((loss, correct))

    def take(self, step: int, fabric: Fabric) -> tuple[float, float]:
        """Mean loss and top-1 in percent since the last call, over all processes.

        Raises:
            DivergedError: the loss is not finite.
        """
        count = len(self.recent)
        if not count:
            return math.nan, math.nan
        losses = torch.stack([loss for loss, _ in self.recent]).double().sum() / fabric.world_size
        hits = torch.stack([hits for _, hits in self.recent]).double().sum()
        loss, correct = total(torch.stack([losses, hits]), fabric).tolist()
        self.recent.clear()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became NaN or infinite within {count} steps before step {step}; lower optim.lr or "
                "optim.quantizer_lr, or set optim.clip_norm."
            )
        self.totals[:] = [self.totals[0] + loss, self.totals[1] + correct, self.totals[2] + count]
        return loss / count, 100 * correct / (count * self.batch_size)

    def epoch(self, step: int, fabric: Fabric) -> dict[str, float]:
        """Mean loss and top-1 of the epoch, whose sums start again."""
        if self.recent:
            self.take(step, fabric)
        loss, correct, count = self.totals
        count = max(count, 1)
        self.totals[:] = [0.0, 0.0, 0.0]
        return {"train_loss": loss / count, "train_top1": 100 * correct / (count * self.batch_size)}
