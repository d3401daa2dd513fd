"""What a model is for the length of a `with`: the float network, or in eval mode; afterwards all is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from qtemper.quantizer import quantizers


@contextlib.contextmanager
def float_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model with all quantizers off: the float network with the latent weights, inside a `with`."""
    affected = [quantizer for _, quantizer in quantizers(model) if quantizer.enabled]
    for quantizer in affected:
        quantizer.enabled = False
    try:
        yield model
    finally:
        for quantizer in affected:
            quantizer.enabled = True


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside a `with`; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
