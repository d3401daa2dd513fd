"""`python -m benchmarks.gpu_quantizer`: the bandwidth of compiled quantizers on a CUDA card, beside a copy's.

Each is a `Quantizer` through torch.compile. Bytes are those that must move: the forward pass reads x and writes x_hat,
the backward pass reads x and the gradient and writes the gradient of x (the sums for scale and delta are a few
numbers). Calls on several tensors in turn, so that no cache holds them, are recorded as one CUDA graph and replayed:
at these sizes a call from Python takes longer than its kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.training_step.statistics import Spread, spread
from torch import Tensor

from qtemper.environment import environment
from qtemper.methods import get_method
from qtemper.quantizer import Quantizer, QuantSpec, TensorKind

SETS, REPLAYS = 4, 21
"""Tensors that take turns, and timed replays."""

CASES: dict[str, tuple[str, TensorKind]] = {
    "lsq, activations": ("lsq", "activation"),
    "tempering, activations": ("tempering", "activation"),
    "tempering, weights": ("tempering", "weight"),
}


def quantizer(method: str, kind: TensorKind) -> Quantizer:
    """Four bits, calibrated, in training."""
    spec, chosen = QuantSpec(4), get_method(method)
    made = Quantizer(spec, chosen.grid(kind, spec, 1), chosen.rounding(kind, spec))
    if kind == "activation":
        made.grid.initialize("unsigned", torch.tensor(0.2))
    else:
        made.grid.initialize("signed", torch.tensor(0.3))
    made.set_progress(0.1)
    return made.cuda().train()


def tensors(kind: TensorKind, megabytes: int, dtype: torch.dtype) -> list[Tensor]:
    """Activations of 64 channels, 56 by 56 pixels, channels_last; or weights of a linear layer."""
    count = megabytes * 2**20 // dtype.itemsize
    made = []
    for _ in range(SETS):
        if kind == "activation":
            x = torch.randn(count // (64 * 56 * 56), 64, 56, 56, device="cuda").relu_()
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        else:
            x = torch.randn(count // 4096, 4096, device="cuda").to(dtype)
        made.append(x)
    return made


def microseconds(calls: Callable[[], object]) -> Spread:
    """Of one of the `SETS` calls that `calls` makes."""
    for _ in range(3):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # On the stream that everything has run on: a backward pass runs on its forward pass's, and a recording on another
    # one must not wait for it.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = calls()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / SETS)
    del kept
    return spread(times)


def measure(name: str, megabytes: int, dtype: torch.dtype, mode: str | None) -> dict[str, object]:
    """Times of copy, forward and backward, and the passes' share of the copy's bandwidth."""
    method, kind = CASES[name]
    torch.compiler.reset()
    module = quantizer(method, kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
    xs = [x.requires_grad_() for x in tensors(kind, megabytes, dtype)]
    grads = [torch.randn_like(x) for x in xs]
    into = [torch.empty_like(x) for x in xs]
    inputs = list(module.parameters())

    def copy() -> None:
        with torch.no_grad():
            for x, y in zip(xs, into, strict=True):
                y.copy_(x)

    def forward() -> list[Tensor]:
        return [compiled(x) for x in xs]

    outs = forward()

    def backward() -> list[object]:
        return [
            torch.autograd.grad(out, [x, *inputs], grad, retain_graph=True)
            for out, x, grad in zip(outs, xs, grads, strict=True)
        ]

    times = {"copy": microseconds(copy), "forward": microseconds(forward), "backward": microseconds(backward)}
    size = xs[0].numel() * dtype.itemsize
    rate = {
        key: moves * size / times[key].median / 1e6 for key, moves in (("copy", 2), ("forward", 2), ("backward", 3))
    }
    found: dict[str, object] = {"case": name, "megabytes": megabytes, "dtype": str(dtype), "mode": mode}
    found |= {"microseconds": {key: value.__dict__ for key, value in times.items()}, "terabytes_per_second": rate}
    print(
        f"{name:24} {megabytes:5} MB {str(dtype)[6:]:9} {mode or 'default':12} copy {rate['copy']:.2f} TB/s, "
        f"forward {rate['forward'] / rate['copy']:.0%}, backward {rate['backward'] / rate['copy']:.0%} "
        f"({times['forward'].median:.0f} and {times['backward'].median:.0f} us)",
        flush=True,
    )
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[64, 512], help="of a tensor")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["default"], help="of torch.compile")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_quantizer.json"))
    chosen = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # a backward pass is to run more than once
    found = []
    stream = torch.cuda.Stream()  # the default one cannot be recorded
    for mode, name, dtype, size in itertools.product(chosen.modes, chosen.cases, chosen.dtypes, chosen.megabytes):
        try:
            with torch.cuda.stream(stream):
                found.append(measure(name, size, getattr(torch, dtype), None if mode == "default" else mode))
        except RuntimeError as error:  # one that fails must not take the others' numbers along
            print(f"{name}, {size} MB, {dtype}: {error}"[:300], flush=True)
        record = {"environment": environment(0), "found": found}
        chosen.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
