"""Tell the quantizers how far training is: `set_progress`, or `Tempering` in the shape of a scheduler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtemper.quantizer import Rounding, quantizers


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell every quantizer how far training is: call once per optimizer step, before the forward pass.

    Args:
        model: a prepared model.
        progress: `step / num_steps`, in [0, 1].

    Raises:
        ValueError: if progress is outside [0, 1], or the model has no quantizers.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}; pass step / num_steps.")
    roundings: dict[type[Rounding], list[Rounding]] = {}
    for _, quantizer in quantizers(model):
        quantizer.grid.set_progress(progress)
        roundings.setdefault(type(quantizer.rounding), []).append(quantizer.rounding)
    for kind, found in roundings.items():
        kind.set_progress_together(found, progress)
    if not roundings:
        raise ValueError("the model has no quantizers; call qtemper.prepare(model, method, policy) first.")


def temperature(model: nn.Module) -> float | None:
    """The highest temperature of the model's quantizers, or None where none has any."""
    found = [t for _, q in quantizers(model) if isinstance(t := getattr(q.rounding, "temperature", None), Tensor)]
    return float(torch.stack([t.to(found[0].device) for t in found]).max()) if found else None


class Tempering:
    """`set_progress` in the shape of a learning-rate scheduler: one `step()` per optimizer step.

    Args:
        model: a prepared model.
        total_steps: number of optimizer steps of the whole training.

    Every method wants it: noise, hardness, dampening and whatever else changes while training goes on follow progress.

    Raises:
        ValueError: `total_steps` below 1; a model without quantizers.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
        self.model = model
        self.total_steps = total_steps
        self.last_step = 0
        set_progress(model, 0.0)

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.last_step += 1
        set_progress(self.model, min(1.0, self.last_step / self.total_steps))

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if the checkpoint is of a training of another length.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the checkpoint counts {state['total_steps']} steps, this training {self.total_steps}: "
                "build Tempering with the same total_steps to continue."
            )
        self.last_step = state["last_step"]
        set_progress(self.model, min(1.0, self.last_step / self.total_steps))
