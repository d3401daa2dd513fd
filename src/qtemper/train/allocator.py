"""Keep glibc from handing large blocks back to the kernel after every training step.

By default glibc returns a large block as soon as it is freed, and a training step frees all its activations, so
every step faults them in again: 8 to 16 percent of a CPU step, a third with two processes side by side.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP = 2**30


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; returns whether it did (False on anything but glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # mallopt takes ints and returns 1 on success; the mmap threshold is capped by glibc at 32 MiB on 64 bits
    # unless set explicitly, hence all three.
    return all(mallopt(option, _KEEP) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD))
