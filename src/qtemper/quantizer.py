"""The one idea: a quantizer is a grid times a rounding.

A `Grid` says where the levels are, a `Rounding` what replaces `round()` while training; a `Method` names both for
weights and for activations. The final class `Quantizer` joins them, and its forward is the only fake quantization
in the package:

    x --Grid.encode--> v --Rounding (train) | round (eval)--> v' --Grid.decode--> x_hat
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.errors import NotCalibratedError, check_choices
from qtemper.functional import CodeRange, Levels

TensorKind = Literal["weight", "activation"]


@dataclass(frozen=True)
class QuantSpec:
    """What one quantizer must represent.

    Attributes:
        bits: 1 to 8.
        levels: `unsigned`, `signed` or `symmetric` (see `functional.code_range`); `auto` is settled at
            calibration by the data: unsigned if nothing is negative, otherwise signed, and symmetric at 1 bit,
            where two's complement has no positive level.
        channel_axis: dimension with one scale per index, or None for one scale per tensor.
    """

    bits: int
    levels: Levels | Literal["auto"] = "auto"
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise ValueError(f"bits must be an integer from 1 to 8, got {self.bits!r}.")
        F.code_range(self.bits, "signed" if self.levels == "auto" else self.levels)

    def resolve(self, has_negative: bool) -> Levels:
        """The kind of grid, once it is known whether the tensor has negative values."""
        if self.levels != "auto":
            return self.levels
        if not has_negative:
            return "unsigned"
        return "symmetric" if self.bits == 1 else "signed"


class Grid(nn.Module, ABC):
    """Where are the levels? Holds what is learned about them, encodes real values and decodes positions.

    Subclasses are final. They hold their parameters, in final shape, from construction on.

    Attributes:
        has_offset: whether x = 0 can lie off the grid, so that levels are no multiples of half a bin.

    Args:
        spec: bits, kind of levels, channel axis.
        num_channels: size of the channel axis; ignored if the scale is per tensor.
    """

    code_range: Tensor
    has_offset: bool = False

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__()
        self.spec = spec
        # One scale for all is a vector of one: sharded training refuses parameters without a dimension.
        self.shape: tuple[int, ...] = (1,) if spec.channel_axis is None else (num_channels,)
        # The range is state (an `auto` grid learns it from data), so it lives in a buffer; the graph wants
        # Python numbers, so they are mirrored. NaN: not calibrated yet.
        self.register_buffer("code_range", torch.full((3,), math.nan))
        self._limits: CodeRange | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the grid knows its levels."""
        return self._limits is not None

    @property
    def limits(self) -> CodeRange:
        """Smallest and largest code, and the code of zero.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        if self._limits is None:
            raise NotCalibratedError("not calibrated")
        return self._limits

    @property
    def levels(self) -> Levels | Literal["auto"]:
        """The kind of grid; `auto` until calibration has settled it."""
        if self._limits is None:
            return self.spec.levels
        if self._limits.zero_point:
            return "symmetric"
        return "signed" if self._limits.qmin else "unsigned"

    def initialize(self, levels: Levels, scale: Tensor) -> None:
        """Set the levels from calibration.

        Args:
            levels: kind of grid.
            scale: bin size, shape (1,), or (num_channels,) with a channel axis.
        """
        self._limits = F.code_range(self.spec.bits, levels)
        with torch.no_grad():
            self.code_range.copy_(torch.tensor(self._limits))
            self.set_scale(scale.reshape(self.shape))

    def reset(self) -> None:
        """Forget the calibration."""
        self._limits = None
        self.code_range.fill_(math.nan)

    @abstractmethod
    def set_scale(self, scale: Tensor) -> None:
        """Take the calibrated bin size, shape (1,) or (num_channels,)."""

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor:
        """Bin size for `x`, positive, broadcastable to it, in its dtype."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Position of `x` on the grid, in bins, clamped to the range and not rounded."""

    @abstractmethod
    def decode(self, value: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Real values of positions, with the gradient that trains the grid.

        Args:
            value: the position after rounding, in bins.
            v: what `encode` returned.
            x: what it was given, for grids whose levels are a function of it.
        """

    def set_progress(self, progress: float) -> None:
        """Called once per optimizer step with progress in [0, 1]."""

    def per_channel(self, x: Tensor, scale: Tensor) -> Tensor:
        """View `scale` so that it broadcasts along the channel axis of `x`, in the dtype of `x`."""
        shape = []
        if self.spec.channel_axis is not None:
            shape = [1] * x.dim()
            shape[self.spec.channel_axis] = -1
        return scale.reshape(shape).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        qmin, qmax, zero_point = self.code_range.tolist()
        if math.isnan(qmin):
            self._limits = None
            return
        limits = CodeRange(int(qmin), int(qmax), zero_point)
        kinds: tuple[Levels, ...] = ("unsigned", "signed", "symmetric")
        own = [F.code_range(self.spec.bits, k) for k in kinds if self.spec.levels in ("auto", k)]
        if limits in own:
            self._limits = limits
        else:
            self.reset()
            errors = kwargs.get("error_msgs", args[-1] if args else [])
            errors.append(
                f"{prefix}code_range: the checkpoint's codes {limits.qmin}..{limits.qmax} are not those of "
                f"{self.spec.bits} bits, levels={self.spec.levels}; prepare the model with the checkpoint's policy."
            )


class Rounding(nn.Module, ABC):
    """What replaces `round()` while training: positions in, surrogate positions with their gradient out.

    What changes during training (a temperature, a hardness) is a buffer that `set_progress` fills, so that
    torch.compile does not specialise on it and a checkpoint holds it. `forward` changes nothing but what a backward
    pass adds to statistics: the fast path calls it again to recompute. Subclasses are final.
    """

    hard_forward: bool = False
    """Whether the forward value is the hard quantizer's and the surrogate shapes the gradient only."""

    integral: bool = False
    """Whether training values are codes: integers in [qmin, qmax]."""

    reach: int | None = None
    """How far outside [qmin, qmax] a training value can lie, in bins, rounded up; None if anywhere.

    Values farther out wrap around where they become 8-bit integers."""

    wants_curvature: bool = False
    """Whether `curvature.update_curvature` should measure this tensor's Hessian diagonal now and then."""

    @abstractmethod
    def forward(self, v: Tensor) -> Tensor:
        """Surrogate of `round(v)`; `v` in bins, any shape, float32 or float64."""

    def set_progress(self, progress: float) -> None:
        """Called once per optimizer step with progress in [0, 1]."""

    @classmethod
    def set_progress_together(cls, roundings: Sequence[Any], progress: float) -> None:
        """`set_progress` of all a model's roundings of this class; override it to do so in fewer operations."""
        for rounding in roundings:
            rounding.set_progress(progress)

    def statistics(self) -> list[Tensor]:
        """Buffers with sums over the step's elements, which several processes have to add up."""
        return []

    def set_curvature(self, mean_diagonal: float, gradient_std: float) -> None:
        """Take the mean diagonal of the Hessian and the gradient's standard deviation, both per bin."""


class Method(ABC):
    """A quantization method: a frozen dataclass of hyperparameters that builds grids and roundings.

    A subclass lives in its own file in `qtemper/methods/`, which is the registry; its `name` is the file's.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_choices(self, self.name)

    @abstractmethod
    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """The grid for a weight or an activation."""

    @abstractmethod
    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """The training surrogate for a weight or an activation."""

    def default_levels(self, kind: TensorKind) -> Levels | Literal["auto"]:
        """The kind of grid where the policy does not say."""
        return "auto"


@final
class Quantizer(nn.Module):
    """Fake quantization of one tensor: the product of a grid and a rounding.

    In training mode the rounding's surrogate, in eval mode the hard quantizer, whatever the temperature:
    `(codes - zero_point) * scale`, with a straight-through gradient. Half-precision inputs are quantized in
    float32 and returned in their own dtype: a bfloat16 mantissa cannot hold an 8-bit position and its fraction.

    Args:
        spec: bits, levels, channel axis.
        grid: where the levels are.
        rounding: what replaces `round()` in training.
    """

    def __init__(self, spec: QuantSpec, grid: Grid, rounding: Rounding) -> None:
        super().__init__()
        self.spec = spec
        self.grid = grid
        self.rounding = rounding
        self.name = "quantizer"
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`; shape and dtype are kept.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        return self.quantize(x)[0] if self.enabled else x

    def quantize(self, x: Tensor, snap: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Fake-quantized `x` in its dtype, and the position behind it: in bins, float32 or float64, no gradient.

        Args:
            x: real values, any shape.
            snap: moves positions to others, straight through; for a finer grid that noise shall stay on.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        self.require_calibrated()
        real = x.to(torch.promote_types(x.dtype, torch.float32))
        v = self.grid.encode(real)
        value = self.rounding(v) if self.training else F.round_ste(v)
        if snap is not None:
            value = F.replace_value(value, snap(value.detach()))
        x_hat = self.grid.decode(value, v, real)
        if self.training and self.rounding.hard_forward:
            value = torch.round(v)
            x_hat = F.replace_value(x_hat, self.grid.decode(value, v, real).detach())
        return x_hat.to(x.dtype), value.detach()

    def positions(self, x: Tensor, *, hard: bool = False) -> Tensor:
        """The second of `quantize`, without the other's cost; `hard`: that of the hard quantizer, in training too.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        self.require_calibrated()
        surrogate = self.training and not self.rounding.hard_forward and not hard
        with torch.no_grad():
            v = self.grid.encode(x.to(torch.promote_types(x.dtype, torch.float32)))
            return self.rounding(v) if surrogate else torch.round(v)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, int16, in [qmin, qmax]: what a device stores.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        return self.positions(x, hard=True).to(torch.int16)

    def set_progress(self, progress: float) -> None:
        """Pass training progress in [0, 1] to the grid and the rounding."""
        self.grid.set_progress(progress)
        self.rounding.set_progress(progress)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        state = "" if self.grid.calibrated else ", not calibrated"
        return f"{self.spec.bits} bits, levels={self.spec.levels}{state}"

    @property
    def integral(self) -> bool:
        """Whether the forward pass now rounds to codes: in eval mode, and in training where the method says so."""
        return not self.training or self.rounding.integral or self.rounding.hard_forward

    def require_calibrated(self) -> None:
        """Raise if there is no scale yet, unless the quantizer is off.

        Raises:
            NotCalibratedError: before `calibrate`.
        """
        if self.enabled and not self.grid.calibrated:
            raise NotCalibratedError(
                f"{self.name} has no scale yet: run qtemper.calibrate(model, batches) after prepare, "
                "or load a checkpoint of the prepared model."
            )


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of a model with their names, each once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
