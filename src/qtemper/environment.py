"""Where a number comes from: versions, processor, GPU, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm")
"""CPU features that decide speed, and in part exactness, of low-bit kernels."""


def environment(seed: int) -> dict[str, Any]:
    """Where a number comes from: versions, processor, GPU, commit, seed."""
    return {
        "qtemper": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_flags": cpu_flags(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def version() -> str:
    """The installed package's version; of a source tree on the path, "unknown"."""
    try:
        return importlib.metadata.version("qtemper")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def cpu_flags() -> list[str]:
    """Those of `CPU_FLAGS` that this processor has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in CPU_FLAGS if flag in words]


def commit() -> str | None:
    """The commit of the source tree the package runs from, with `-dirty`; None for an installed package."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        out = subprocess.run(git, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
