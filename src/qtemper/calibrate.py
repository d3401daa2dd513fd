"""Give every quantizer its first scale from data, and re-estimate batch norm afterwards.

The float network runs over the calibration batches while every activation quantizer keeps a bounded sample of what
it saw; weights are at hand. All scales are found before any is set, so a failure leaves the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtemper import functional as F
from qtemper.errors import CalibrationError
from qtemper.functional import CodeRange, Levels
from qtemper.layers import QuantLayer
from qtemper.modes import eval_mode, float_mode
from qtemper.quantizer import Quantizer, QuantSpec, quantizers

Observer = Literal["mse", "percentile", "max", "lsq", "ewgs"]
OBSERVERS: tuple[Observer, ...] = ("mse", "percentile", "max", "lsq", "ewgs")

PERCENTILE = 99.99
"""Share of the magnitudes, in percent, that `percentile` keeps unclipped."""

SAMPLES_PER_BATCH, SAMPLES = 2**16, 2**20
"""Elements that a quantizer keeps of each batch, and in all: enough for a scale, little enough for memory."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observer: Observer = "mse",
    batch_norm: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Set the scale of every quantizer; settle whether each `auto` input is signed.

    Args:
        model: a prepared model, in any mode, on any device; its mode is kept.
        batches: inputs, or tuples whose first entry is the input, or whatever `forward` takes. 256 to 1,024 samples
            are usually enough. Batches are moved to the model's device.
        observer: `mse` (least mean squared error), `percentile`, `max` (nothing clipped), `lsq`
            (2 * mean|x| / sqrt(qmax), Esser et al. 2020, section 2.1), or `ewgs` (levels over 6 standard deviations, of
            which a signed grid of 2 bits has 4 below zero, or from 0 to 3 of the normal distribution of which a ReLU
            left half; Lee et al. 2021, their code). The last two are starts for a scale that is learned; one that is
            not (`ste`'s, that of an 8-bit network input, any without a gradient now) is fitted by `mse` instead.
        batch_norm: afterwards re-estimate batch-norm statistics in the quantized network from the same batches.
        forward: how to run the model on a batch, if not `model(batch)`.

    Returns:
        The same model.

    Raises:
        CalibrationError: no batches; constant, all-zero or non-finite input or weights (the message names the
            layer); a layer that never ran.
        ValueError: unknown observer, or a model without quantizers.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"unknown observer {observer!r}; use one of {', '.join(OBSERVERS)}.")
    if not any(True for _ in quantizers(model)):
        raise ValueError("the model has no quantizers; call qtemper.prepare(model, method, policy) first.")
    refuse_one_tensor(batches)
    run = forward or _default_forward
    if batch_norm:
        batches = list(batches)
    found = _observe_weights(model) | _observe_activations(model, batches, run)
    settings = [(q, _fit(name, q.spec, found[q], _observer_of(q, observer))) for name, q in quantizers(model)]
    for quantizer, (levels, scale) in settings:
        quantizer.grid.initialize(levels, scale)
    if batch_norm:
        reestimate_batch_norm(model, batches, forward=run)
    return model


def _observer_of(quantizer: Quantizer, observer: Observer) -> Observer:
    learned = any(parameter.requires_grad for parameter in quantizer.grid.parameters())
    return observer if learned or observer not in ("lsq", "ewgs") else "mse"


def refuse_one_tensor(batches: Iterable[Any]) -> None:
    """Its rows would be taken for batches.

    Raises:
        CalibrationError: `batches` is a tensor.
    """
    if isinstance(batches, Tensor):
        raise CalibrationError("batches is one tensor; pass a list of batches: [x].")


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace batch-norm running statistics by the average over `batches`, by their sizes, in the quantized network.

    Only batch-norm layers run in training mode meanwhile; everything else, noise included, in eval mode.

    Args:
        model: a prepared, calibrated model; its mode is kept.
        batches: see `calibrate`.
        forward: see `calibrate`.

    Raises:
        CalibrationError: no batches, or one of a single value per channel; the statistics stay as they were.
    """
    run = forward or _default_forward
    refuse_one_tensor(batches)
    batches = list(batches)
    if not batches:
        raise CalibrationError("reestimate_batch_norm got no batches; pass at least one (a consumed iterator?).")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [({name: tensor.clone() for name, tensor in norm.named_buffers()}, norm.momentum) for norm in norms]
    seen = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        x = inputs[0] if inputs else named["input"]
        count = x.numel() // x.shape[1]
        seen[norm] += count
        norm.momentum = count / max(1, seen[norm])

    hooks = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms]
    done = False
    with eval_mode(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        try:
            for batch in batches:
                run(model, _to_device(batch, model))
            done = True
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise CalibrationError(f"a batch is too small for batch norm ({error}); leave it out.") from error
        finally:
            for hook in hooks:
                hook.remove()
            for norm, (buffers, momentum) in zip(norms, before, strict=True):
                norm.momentum = momentum
                if not done:
                    norm.load_state_dict(buffers, strict=False)


def _default_forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _to_device(batch: Any, model: nn.Module) -> Any:
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to_device(value, model) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_to_device(value, model) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


class _Sample:
    """A bounded sample of a tensor seen in pieces, with the exact extremes; rows are channels, or one row."""

    def __init__(self, spec: QuantSpec, limit: int = SAMPLES) -> None:
        self.axis, self.limit = spec.channel_axis, limit
        self.pieces: list[Tensor] = []
        self.low = self.high = torch.tensor(())  # by row
        self.whole = True

    def add(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        low, high = (extreme.cpu() for extreme in rows.aminmax(dim=1))
        # torch's minimum and maximum propagate NaN, Python's do not.
        self.low = torch.minimum(self.low, low) if self.low.numel() else low
        self.high = torch.maximum(self.high, high) if self.high.numel() else high
        room = min(self.limit, SAMPLES - sum(piece.numel() for piece in self.pieces)) // rows.shape[0]
        if self.pieces and room < 1:
            self.whole = False
            return
        if rows.shape[1] > room >= 1:
            self.whole = False
            # A stride near the golden ratio spreads any number of samples evenly over positions and channels.
            index = torch.arange(room, device=rows.device) * _coprime_stride(rows.shape[1])
            rows = rows[:, index % rows.shape[1]]
        self.pieces.append(rows.cpu())

    def rows(self) -> Tensor:
        """What was kept of each row; where that is not all, with the row's extremes as its last two."""
        if self.whole:
            return torch.cat(self.pieces, dim=1)
        return torch.cat([*self.pieces, self.low[:, None], self.high[:, None]], dim=1)


def _coprime_stride(length: int) -> int:
    stride = max(1, int(0.618 * length))
    while math.gcd(stride, length) != 1:
        stride += 1
    return stride


def _observe_weights(model: nn.Module) -> dict[Quantizer, _Sample]:
    found = {}
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and isinstance(layer.weight_quantizer, Quantizer):
            sample = found[layer.weight_quantizer] = _Sample(layer.weight_quantizer.spec)
            sample.add(layer.latent_weight)
    return found


def _observe_activations(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> dict[Quantizer, _Sample]:
    samples = {
        layer.act_quantizer: _Sample(layer.act_quantizer.spec, SAMPLES_PER_BATCH)
        for layer in model.modules()
        if isinstance(layer, QuantLayer) and layer.act_quantizer is not None
    }

    def keep(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, Quantizer)
        samples[quantizer].add(inputs[0])

    hooks = [quantizer.register_forward_pre_hook(keep) for quantizer in samples]
    seen = 0
    try:
        with eval_mode(model), float_mode(model), torch.no_grad():
            for batch in batches:
                seen += 1
                run(model, _to_device(batch, model))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise CalibrationError("calibrate got no batches; pass at least one batch of inputs (a consumed iterator?).")
    return samples


def _fit(name: str, spec: QuantSpec, sample: _Sample, observer: Observer) -> tuple[Levels, Tensor]:
    """Kind of grid and scale for one quantizer."""
    is_weight = name.endswith("weight_quantizer")
    what = f"the {'weight' if is_weight else 'input'} of {name.rsplit('.', 1)[0] if '.' in name else 'the model'}"
    way_out = f"or keep the layer in float with Rule({name.rpartition('.')[0]!r}, weight=32, activation=32)"
    if not sample.pieces:
        raise CalibrationError(
            f"{what} was never seen: no batch reached the layer, or empty ones did; pass batches that do, {way_out}."
        )
    low, high = float(sample.low.min()), float(sample.high.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(f"{what} has NaN or infinite values; check the weights before it and the batches.")
    if low == high == 0:
        raise CalibrationError(f"{what} is all zero, no scale fits; pass real batches or trained weights, {way_out}.")
    if low == high and not is_weight:
        raise CalibrationError(f"{what} is constant ({low:g}), no scale fits; pass real batches, {way_out}.")
    levels = spec.resolve(has_negative=low < 0 or is_weight)
    if levels == "unsigned" and low < 0:
        raise CalibrationError(
            f"{what} has negative values (down to {low:g}) but its grid is unsigned; "
            "set its levels to 'signed' or 'auto' in the policy."
        )
    rows = sample.rows()
    scale = search_scale(rows, F.code_range(spec.bits, levels), observer)
    # A dead channel (a pruned filter) has no scale of its own; any will do, and the others' keeps it in proportion.
    dead = rows.abs().amax(dim=1) == 0
    if dead.any():
        scale[dead] = scale[~dead].median()
    return levels, scale if spec.channel_axis is not None else scale[0]


def search_scale(rows: Tensor, limits: CodeRange, observer: Observer) -> Tensor:
    """Bin size for each row of samples.

    Args:
        rows: samples, shape (channels, n), float.
        limits: the grid's range.
        observer: the criterion; see `calibrate`.

    Returns:
        Scales, shape (channels,), in the unit of `rows`; 0 for a row of zeros.
    """
    outermost = _max_scale(rows, limits)
    if observer == "max":
        return outermost
    if observer == "percentile":
        kept = max(1, math.ceil(rows.shape[1] * PERCENTILE / 100))
        clipped = rows.abs().kthvalue(kept, dim=1).values
        return _max_scale(torch.minimum(torch.maximum(rows, -clipped[:, None]), clipped[:, None]), limits)
    if observer == "lsq":
        return 2 * rows.abs().mean(dim=1) / math.sqrt(limits.qmax or -limits.qmin)
    if observer == "ewgs":
        half_normal = math.sqrt(1 - 2 / math.pi)  # standard deviation of |x| for a standard normal x
        width = 3 / half_normal if limits.qmin == limits.zero_point else 6
        scale = width * rows.std(dim=1, correction=0) / (limits.qmax - limits.qmin)
        return torch.where(scale > 0, scale, outermost)
    return _mse_scale(rows, limits, outermost)


def _max_scale(rows: Tensor, limits: CodeRange) -> Tensor:
    """The smallest bin size that clips nothing, not even by the rounding errors of dividing by it."""
    top = rows.amax(dim=1).clamp_min(0)
    bottom = (-rows.amin(dim=1)).clamp_min(0)
    above, below = limits.qmax - limits.zero_point, limits.zero_point - limits.qmin
    scale = top / above if above > 0 else torch.zeros_like(top)
    if below > 0:
        scale = torch.maximum(scale, bottom / below)
    return scale * (1 + 2.0**-22)


def _mse_scale(rows: Tensor, limits: CodeRange, outermost: Tensor) -> Tensor:
    """Least-squares bin size: a coarse search over fractions of the unclipped one, then a fine one around it."""

    def errors(fractions: Tensor) -> Tensor:
        out = []
        for fraction in fractions.T:
            scale = (outermost * fraction).clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
            x_hat = F.decode(torch.round(F.encode(rows, scale, limits)), scale, limits)
            out.append((x_hat - rows).square().mean(dim=1))
        return torch.stack(out, dim=1)

    coarse = torch.logspace(-3, math.log10(1.25), 64, dtype=rows.dtype)
    best = coarse[errors(coarse.expand(rows.shape[0], -1)).argmin(dim=1)]
    fine = best[:, None] * torch.linspace(0.9, 1.12, 23, dtype=rows.dtype)
    best = fine.gather(1, errors(fine).argmin(dim=1, keepdim=True))[:, 0]
    return outermost * best
