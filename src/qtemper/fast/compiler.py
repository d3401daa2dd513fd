"""torch.compile's C++ compiler, made ready while torch.compile is still reading the network.

Before it writes the first loop for a CPU, torch.compile tries the CPU's vector instructions on the compiler, one kind
after another, and compiles a header of its own: 15 to 20 s of a first start on an Intel CPU with AMX, in which one core
works (torch 2.13). What comes of it is files in its cache, and any process may make them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading

# Without what Python finds in the current directory, as the user's program would not look there.
_SMALLEST = """
import sys
sys.path[:] = filter(None, sys.path)
import torch
torch.compile(lambda x: x + 1)(torch.ones(64))
"""
_NOT_ITS_OWN = ("TORCH_LOGS", "TORCH_TRACE", "TORCH_COMPILE_", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")
"""Variables of the user's job: its logs, its caches."""


@functools.cache  # once in a process
def prepare_compiler() -> None:
    """Begin, in a process of its own, what torch.compile needs before it compiles anything for a CPU; does not wait.

    `train.fit` calls it; before your own training loop, do so before its first step. That process may outlive this one
    by half a minute. Nothing happens on a single core; where it fails, torch.compile does everything itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # In a program that holds its own Python, the executable is that program.
    if cores == 1 or not sys.executable or getattr(sys, "frozen", False):
        return
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_ITS_OWN)}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers, each of which would import torch
    command = [sys.executable, "-c", _SMALLEST]
    threading.Thread(target=_run, args=(command, environment), name="qtemper-compiler", daemon=True).start()


def _run(command: list[str], environment: dict[str, str]) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not leave half a file in the cache, which torch would take for whole
            timeout=300,
            check=False,
        )
