"""Three smaller questions: the curvature update's cost, compile times cold and cached, and growth with size."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.training_step.contestants import HESSIAN, TOTAL_STEPS
from benchmarks.training_step.rounds import WorkerError, worker
from benchmarks.training_step.setup import Setup
from benchmarks.training_step.statistics import spread

BATCHES, DRAWS = 3, 50
"""Of one update: the engine's defaults, draws at most."""

FEW, MORE = 1, 3
"""Draws that are timed; an update of more is a straight line through the two."""

SIZES = (32, 64, 128, 256)
DEPTHS = ("resnet20", "resnet32", "resnet44", "resnet56")

Say = Callable[[str], None]


def curvature(setup: Setup, step_seconds: float, *, fast: bool) -> dict[str, Any]:
    """Seconds of EWGS's Hessian update as the engine does it, and its share of the ten epochs between two."""
    setup = dataclasses.replace(setup, precision="float32")  # a second derivative is taken in float32
    with worker(HESSIAN, setup, fast=fast) as one:
        one.begin()
        one.ask(draws=[FEW])  # not counted: first use
        few, more = one.ask(draws=[FEW, MORE])["seconds"]
    draw = (more - few) / (MORE - FEW)
    update = BATCHES * (few + (DRAWS - FEW) * draw)
    return {
        "seconds_per_draw": draw,
        "seconds_per_update": update,
        "share_of_ten_epochs": update / (TOTAL_STEPS * step_seconds),
    }


def curvature_line(found: dict[str, Any]) -> str:
    """The result in words."""
    return (
        f"EWGS's Hessian update, {BATCHES} batches of {DRAWS} draws: {found['seconds_per_update']:.1f} s "
        f"({found['seconds_per_draw']:.2f} s a draw), once in {TOTAL_STEPS} steps: "
        f"+{found['share_of_ten_epochs']:.1%} of their time"
    )


def compile_times(keys: list[str], setup: Setup, *, fast: bool, say: Say) -> dict[str, dict[str, Any]]:
    """Seconds of the first step with an empty compiler cache, and in a second process with the first one's cache.

    Headers that torch compiles are not in its cache directory but in that of temporary files. Of both, a process that
    prepares the compiler may still write some while they are removed.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        with tempfile.TemporaryDirectory(prefix="training-step-cache-", ignore_cleanup_errors=True) as cache:
            try:
                for start in ("cold", "cached"):
                    directory = {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
                    with worker(key, setup, fast=fast, environment=directory) as one:
                        found.setdefault(key, {})[start] = one.begin()["first_step_seconds"]
                say(f"{key}: first step {found[key]['cold']:.1f} s, second start {found[key]['cached']:.1f} s")
            except WorkerError as failure:
                found[key] = {"failure": str(failure)}
                say(f"{key}: {failure}")
    return found


def scaling(
    keys: list[str], setup: Setup, *, rounds: int, steps: int, fast: bool, say: Say
) -> dict[str, list[dict[str, Any]]]:
    """Median time of a step over batch sizes, and over depths of the CIFAR ResNet at its own batch."""
    setups = [dataclasses.replace(setup, arch="resnet20", batch=size) for size in SIZES]
    setups += [dataclasses.replace(setup, arch=arch, batch=0) for arch in DEPTHS[1:]]
    found: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        for one_setup in setups:
            point: dict[str, Any] = {"arch": one_setup.arch, "batch": one_setup.batch_size}
            try:
                with worker(key, one_setup, fast=fast) as one:
                    point["saved_bytes"] = one.begin()["saved_bytes"]
                    seconds = [t for _ in range(rounds) for t in one.ask(steps=steps)["wall"]]
                    point["seconds"] = spread(seconds).median
                say(
                    f"{key}: {point['arch']}, batch {point['batch']}: {1e3 * point['seconds']:.1f} ms a step, "
                    f"{1e3 * point['seconds'] / point['batch']:.3f} ms an image"
                )
            except WorkerError as failure:
                point["failure"] = str(failure)
                say(f"{key}: {point['arch']}, batch {point['batch']}: {failure}")
            found.setdefault(key, []).append(point)
    return found
