"""Memory of a training step: bytes that autograd keeps for the backward pass, and peaks of the process."""

from __future__ import annotations

import ctypes
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks


class _Kept:
    """Stands for a saved tensor in autograd's graph, and dies with its place there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that are kept between the forward and the backward pass, without parameters and buffers.

    Counted are the storages, each once, that autograd holds when the forward pass has ended: tensors saved for the
    backward pass, by a compiled graph too (it saves through the same door), and tensors that a Python
    `autograd.Function` keeps as attributes of its context. The number depends on nothing but the program.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        # What a node saves and drops before the loss is there (checkpointing, a dead branch) must not count.
        box = _Kept(tensor)
        kept.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        value = loss()
    tensors = [box.tensor for box in kept] + list(_context_attributes(value.grad_fn))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    value.backward()  # type: ignore[no-untyped-call]
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def _context_attributes(root: Node | None) -> Iterator[Tensor]:
    seen: set[Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor))
        todo += [following for following, _ in node.next_functions]


def release(device: str) -> None:
    """Give back memory that is free but held, so that contestants who wait do not crowd out the one that runs."""
    if device == "cuda":
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident() -> int:
    """Bytes of this process in memory now (0 where the system does not tell)."""
    return _status("VmRSS")


def peak_of_process() -> int:
    """Most bytes that this process has had in memory, since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(step: Callable[[], object], device: str) -> int | None:
    """Bytes that `step` needs on top of what the process holds while it waits; None where the system cannot tell."""
    step()  # the memory that stays is there now
    release(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark; getrusage's would stay
    except OSError:
        return None
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
