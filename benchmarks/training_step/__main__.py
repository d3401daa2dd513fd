"""`python -m benchmarks.training_step`: the table on the terminal and in results/training_step.json."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.training_step import extra, report
from benchmarks.training_step.contestants import COMPILED, CONTESTANTS, HESSIAN, REFERENCE
from benchmarks.training_step.rounds import ROOT, WorkerError, race
from benchmarks.training_step.setup import FIRST_LAST, PRECISIONS, SHAPES, Setup

from qtemper import BitPolicy


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(SHAPES), default=["resnet20", "resnet18", "mobilenet_v2"])
    add("--bits", nargs="+", default=["W4A4"], help="such as W2A2 W4A4 W8A8")
    add("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    add("--contestants", nargs="+", metavar="NAME", help=f"some of: {', '.join(CONTESTANTS)}; all if not given")
    add("--batch", type=int, default=0, help="images of a step; the network's own if not given")
    add("--first-last", choices=FIRST_LAST, default="8bit", help="bits of the first and last layer, of all contestants")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--rounds", type=int, default=9)
    add("--steps", type=int, default=4, help="measured steps of a visit; each visit begins with one that is not")
    add("--seed", type=int, default=0)
    add("--together", action="store_true", help="start all contestants at once; on many cores, to save time")
    add("--no-fast", action="store_true", help="our methods without their fast path")
    add("--no-curvature", action="store_true", help="leave out the line on EWGS's Hessian update")
    add("--compile-time", action="store_true", help="instead: first step with an empty and with a filled cache")
    add("--scaling", action="store_true", help="instead: time over batch sizes and depths of the CIFAR ResNet")
    add("--quick", action="store_true", help="a tiny network, two rounds of one step, no file: is everything there?")
    add("--out", type=Path, help="the JSON file; results/training_step.json if not given")
    chosen = parser.parse_args(argv)
    for key in chosen.contestants or []:
        if key not in CONTESTANTS:
            parser.error(f"unknown contestant {key!r}; known: {', '.join(CONTESTANTS)}")
    if chosen.rounds < 1 or chosen.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    if chosen.quick:
        chosen.models, chosen.rounds, chosen.steps, chosen.no_curvature = ["small"], 2, 1, True
    return chosen


def setups(chosen: argparse.Namespace) -> list[Setup]:
    """Every combination that was asked for."""
    return [
        Setup(
            arch=arch,
            batch=chosen.batch,
            precision=precision,
            weight=BitPolicy.parse(bits).weight,
            activation=BitPolicy.parse(bits).activation,
            first_last=chosen.first_last,
            device=chosen.device,
            threads=chosen.threads,
            seed=chosen.seed,
        )
        for arch, precision, bits in itertools.product(chosen.models, chosen.precision, chosen.bits)
    ]


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def measure(setup: Setup, chosen: argparse.Namespace) -> dict[str, Any]:
    """One configuration: what was asked for, printed, and as an entry of the JSON file."""
    fast = not chosen.no_fast
    keys = [key for key in CONTESTANTS if key in (chosen.contestants or CONTESTANTS)]
    kind = "compile time" if chosen.compile_time else "scaling" if chosen.scaling else "step"
    run: dict[str, Any] = {"kind": kind, "setup": vars(setup), "fast": fast, "rounds": chosen.rounds}
    run |= {"steps": chosen.steps, "environment": report.provenance(setup)}
    print(f"{setup.title()} ...", file=sys.stderr, flush=True)
    if kind == "compile time":
        compiled = [key for key in keys if key.endswith(COMPILED)]
        return run | {"seconds": extra.compile_times(compiled, setup, fast=fast, say=print)}
    if kind == "scaling":
        options = {"rounds": chosen.rounds, "steps": chosen.steps}
        return run | {"points": extra.scaling(keys, setup, fast=fast, say=print, **options)}
    if REFERENCE not in keys:
        keys.insert(0, REFERENCE)
    results = race(keys, setup, rounds=chosen.rounds, steps=chosen.steps, fast=fast, say=say, together=chosen.together)
    run |= {"results": results, "summary": report.summarize(results)}
    print(report.table(setup, results, run["summary"]))
    if HESSIAN in keys and not chosen.no_curvature:
        try:
            step = run["summary"][HESSIAN]["milliseconds"]["median"] / 1e3
            run["curvature"] = extra.curvature(setup, step, fast=fast)
            print("\n" + extra.curvature_line(run["curvature"]))
        except (WorkerError, KeyError) as failure:
            print(f"\nEWGS's Hessian update: {failure}")
    print(flush=True)
    return run


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    # Python's default ends this process without its clean-up, and a worker in a long step would outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = chosen.out or (None if chosen.quick else ROOT / "results" / "training_step.json")
    for setup in setups(chosen):
        run = measure(setup, chosen)
        if out is not None:
            report.write(out, [run])  # after each, so that an interrupted run keeps what it has
    return 0


if __name__ == "__main__":
    sys.exit(main())
