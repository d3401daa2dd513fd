"""torch.compile's C++ compiler, made ready while torch.compile is still reading the network.

Before it writes the first loop for a CPU, torch.compile tries the CPU's vector instructions on the compiler, one kind
after another, and compiles its own headers: 15 to 20 s of a first start, in which one core works (torch 2.13). What
comes of it is files in its cache, and any process may make them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading

_SMALLEST = "import torch; torch.compile(lambda x: x + 1)(torch.ones(64))"


@functools.cache  # once in a process
def prepare_compiler() -> None:
    """Begin, in a process of its own, what torch.compile needs before it compiles anything for a CPU; does not wait.

    `train.fit` calls it; before your own training loop, do so before the model is built. It changes no result, and
    where it fails torch.compile does everything itself.
    """
    if sys.executable:  # there is none where Python is part of another program
        threading.Thread(target=_compile_smallest, name="qtemper-compiler", daemon=True).start()


def _compile_smallest() -> None:
    with contextlib.suppress(OSError):
        null = subprocess.DEVNULL
        alone = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # without helpers, which import torch once more
        subprocess.run([sys.executable, "-c", _SMALLEST], stdin=null, stdout=null, stderr=null, env=alone, check=False)
