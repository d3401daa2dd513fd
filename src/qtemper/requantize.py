"""One trained model at other bits than it was trained at: its latent weights on other grids, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qtemper.calibrate import Observer, calibrate, reestimate_batch_norm, refuse_one_tensor
from qtemper.errors import UnsupportedModuleError
from qtemper.policy import BitPolicy, Plan
from qtemper.prepare import latent_state, prepare
from qtemper.quantizer import Method, quantizers


def requantize(
    trained: nn.Module,
    model: nn.Module,
    method: Method | str,
    policy: BitPolicy | Plan | str,
    batches: Iterable[Any],
    *,
    observer: Observer = "mse",
    batch_norm: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Quantize a trained model's latent weights anew, at the bits of another policy.

    Grids that follow the weights do so, learned ones start from calibration. A quantizer whose kind of grid, bits,
    levels and granularity are those of the training keeps what it learned there: so do activations where only the
    weights' bits change, and with the training's own policy the result is the trained model.

    Args:
        trained: the trained model, float or prepared; it stays as it is.
        model: a float model of the same architecture, whatever its weights; changed in place.
        method: the method, usually that of the training; only its grid matters in eval mode.
        policy: the new bits.
        batches: for `calibrate`.
        observer: for `calibrate`.
        batch_norm: re-estimate batch-norm statistics from `batches`; else they stay as trained.
        forward: for `calibrate`.
        seed: for `prepare`.

    Returns:
        `model`, prepared and calibrated.

    Raises:
        RuntimeError: `model` has other keys or shapes than `trained`.
        UnsupportedModuleError: `model` is prepared already, or `trained` itself.
        ValueError: what `prepare` and `calibrate` refuse.
    """
    if model is trained or any(True for _ in quantizers(model)):
        raise UnsupportedModuleError("requantize needs a second model: a fresh float one of the same architecture.")
    refuse_one_tensor(batches)
    batches = list(batches)
    model.load_state_dict(latent_state(trained))
    prepare(model, method, policy, seed=seed)
    calibrate(model, batches, observer=observer, forward=forward)
    before = dict(quantizers(trained))
    for name, quantizer in quantizers(model):
        old = before.get(name)
        same = old is not None and old.spec == quantizer.spec and type(old.grid) is type(quantizer.grid)
        if old is not None and same and old.grid.calibrated:
            quantizer.grid.load_state_dict(old.grid.state_dict())
    if batch_norm:
        reestimate_batch_norm(model, batches, forward=forward)
    return model
