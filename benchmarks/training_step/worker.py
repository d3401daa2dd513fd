"""One contestant in a process of its own: `python -m benchmarks.training_step.worker SETUP`, driven over pipes.

It builds the network, takes the first steps, measures memory, says so in a line of JSON, and then answers one line
of JSON with another until its input ends. It runs in the peers' environment too: torch, numpy and the library's core.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from benchmarks.training_step import memory
from benchmarks.training_step.contestants import CONTESTANTS
from benchmarks.training_step.setup import Setup
from torch import Tensor

import qtemper

WARM_UP = 3
"""Steps before anything but the first step is measured."""


class Bench:
    """A contestant that trains."""

    def __init__(self, key: str, setup: Setup) -> None:
        contestant = CONTESTANTS[key]
        self.setup, self.compiled = setup, contestant.compiled
        self.empty = memory.resident()
        started = time.perf_counter()
        self.images, self.labels = setup.data()
        subject = contestant.build(setup, self.images)
        self.model, self.before_step = subject.model, subject.before_step
        self.network = torch.compile(self.model, **contestant.compile_options) if contestant.compiled else self.model
        self.optimizer = torch.optim.SGD(subject.groups, lr=0.01, momentum=0.9)
        self.build_seconds = time.perf_counter() - started
        self.count = 0

    def loss(self) -> Tensor:
        """Forward pass and loss."""
        with torch.autocast(self.setup.device, torch.bfloat16, enabled=self.setup.precision == "bf16"):
            return F.cross_entropy(self.network(self.images), self.labels)

    def step(self) -> None:
        """A training step."""
        self.before_step(self.count)
        self.count += 1
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.setup.device == "cuda":
            torch.cuda.synchronize()

    def timed(self) -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def begin(self) -> dict[str, Any]:
        """First steps and memory."""
        if self.compiled and self.setup.device == "cpu":
            qtemper.fast.prepare_compiler()
        first = self.timed()
        for _ in range(WARM_UP - 1):
            self.step()
        process = memory.peak_of_process() - self.empty
        self.before_step(self.count)
        self.optimizer.zero_grad()
        saved = memory.saved_bytes(self.loss, self.model)
        peak = memory.peak_of(self.step, self.setup.device)
        memory.release(self.setup.device)
        return {
            "versions": _versions(),
            "build_seconds": self.build_seconds,
            "first_step_seconds": first,
            "saved_bytes": saved,
            "peak_step_bytes": peak,
            "peak_process_bytes": process,
        }

    def visit(self, steps: int) -> dict[str, Any]:
        """Wall seconds of each step, CPU seconds and page faults of all; the memory goes back afterwards."""
        self.step()  # not counted: it takes the memory again and warms the caches that another contestant used
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu = time.process_time()
        wall = [self.timed() for _ in range(steps)]
        cpu = time.process_time() - cpu
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        memory.release(self.setup.device)
        return {"wall": wall, "cpu": cpu, "page_faults": faults}

    def curvature(self, draws: list[int]) -> dict[str, Any]:
        """Seconds of a curvature update of one batch with each number of draws."""

        def loss(model: Any, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        seconds = []
        for count in draws:
            started = time.perf_counter()
            batch = [(self.images, self.labels)]
            qtemper.update_curvature(self.model, batch, loss, max_draws=count, tolerance=0.0)
            seconds.append(time.perf_counter() - started)
        return {"draws": draws, "seconds": seconds}


def _versions() -> dict[str, str]:
    """Of torch and of the peers that this process's environment has."""
    found = {}
    for name in ("torch", "brevitas", "nncf", "torchao", "aimet-torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers, qtemper.fast.cached_compilation():
        os.dup2(2, 1)  # what libraries print must not mix with the answers
        _serve(answers)


def _serve(answers: TextIO) -> None:
    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    request = json.loads(sys.argv[1])
    setup = Setup(**request["setup"])
    torch.set_num_threads(setup.threads)
    try:
        bench = Bench(request["contestant"], setup)
        answer(bench.begin())
        for line in sys.stdin:
            action = json.loads(line)
            answer(bench.visit(action["steps"]) if "steps" in action else bench.curvature(action["draws"]))
    except Exception as error:
        traceback.print_exc()
        peer = CONTESTANTS[request["contestant"]].home == "peer"
        kind = "missing" if isinstance(error, ImportError) and peer else "error"
        answer({kind: f"{type(error).__name__}: {error}".splitlines()[0][:200]})


if __name__ == "__main__":
    main()
