"""The fast path: what a quantized layer computes, in fewer passes and less memory, with the same result.

The layer's plain forward (two quantizers, then the float layer's own) is the reference. Here the same quantizers run
so that nothing but the layer's float input is kept for the backward pass, and the convolution runs on integer codes
where that is exact. A method knows nothing of it. `use_fast_path(False)` switches it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch._functorch import config as _aot_config

from qtemper.fast.compiler import prepare_compiler

__all__ = ["cached_compilation", "fast_path", "prepare_compiler", "use_fast_path"]

_enabled = os.environ.get("QTEMPER_FAST", "1") != "0"


def use_fast_path(enabled: bool) -> None:
    """Switch the fast path on (the default, unless the environment has QTEMPER_FAST=0) or off, for all layers.

    A model that is compiled already keeps what it was compiled with.
    """
    global _enabled
    _enabled = enabled


def fast_path() -> bool:
    """Whether the fast path is switched on."""
    return _enabled


@contextmanager
def cached_compilation() -> Iterator[None]:
    """While this is open, torch.compile keeps all of its work on disk, for later processes to start in half the time.

    By default it does so only for networks in which it sees no autograd functions: its check of what may be kept does
    not look into them. Ours read nothing but their arguments and the kind of CPU. Since torch told what it compiles
    (2.13) it sees them only in some methods (`leaf.py`). `train.fit` opens it; around your own training loop, do so
    from the first step on. Without effect before torch 2.7.
    """
    if not hasattr(_aot_config, "autograd_cache_allow_custom_autograd_functions"):
        yield
        return
    with _aot_config.patch(autograd_cache_allow_custom_autograd_functions=True):
        yield
