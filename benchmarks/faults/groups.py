"""Runs of several processes: forked ranks with torchrun's environment, and torchrun itself where its part is tested."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed
from benchmarks.faults.driver import TIMEOUT, Child, Trial, scratch

from qtemper import cli

ROOT = Path(__file__).parents[2]
POLL = 0.1
"""Seconds between two looks at the ranks, as in torchrun."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def torchrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of `size` processes on this machine, at their first start."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    names |= {"ROLE_RANK": rank, "ROLE_WORLD_SIZE": size, "GROUP_WORLD_SIZE": 1, "MASTER_PORT": port}
    names |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    texts = {"ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": f"faults-{port}"}
    return texts | {name: str(value) for name, value in names.items()}


def hold_store(port: int) -> None:
    """In a child: the store through which ranks find each other, until it is killed."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store.port:
        time.sleep(1)


class Group:
    """The ranks of one run of `qtemper ARGUMENTS`, without torchrun's seconds of imports.

    Args:
        arguments: of `qtemper`.
        before: called first in each rank, with its number.
        size: number of ranks.
        settings: more environment variables.
        agent: let one more process hold the store, as torchrun's does; otherwise the first rank holds it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        before: Callable[[int], object] | None = None,
        *,
        size: int = 2,
        settings: dict[str, str] | None = None,
        agent: bool = False,
    ) -> None:
        port = free_port()
        self.agent = Child(lambda: hold_store(port)) if agent else None

        def action(rank: int) -> None:
            os.environ.update(torchrun_environment(rank, size, port) | (settings or {}))
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(agent)
            if before is not None:
                before(rank)
            sys.argv = ["qtemper", *arguments]
            cli.main()

        self.started = time.monotonic()
        self.ranks = [Child(lambda rank=rank: action(rank)) for rank in range(size)]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send every rank a signal."""
        for child in self.ranks:
            child.kill(number)

    def wait(self, timeout: float = TIMEOUT, grace: float = 5.0) -> list[Trial]:
        """Wait until all have ended; when one fails the others get SIGTERM and, `grace` seconds later, SIGKILL."""
        deadline, told = time.monotonic() + timeout, False
        while sum(child.running() for child in self.ranks):  # not any(), which would not ask all of them
            if not told and any(child.code for child in self.ranks):
                time.sleep(POLL)
                self.kill(signal.SIGTERM)
                told, deadline = True, min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.002)
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()
        return [child.wait() for child in self.ranks]


def worst(trials: list[Trial]) -> Trial:
    """The first rank's trial if all ended well, otherwise that of one that did not."""
    return next((trial for trial in trials if trial.code != 0), trials[0])


def run_group(arguments: Sequence[str], *, size: int = 2, settings: dict[str, str] | None = None) -> Trial:
    """A run of `size` processes to its end."""
    return worst(Group(arguments, size=size, settings=settings).wait())


def torchrun(
    arguments: Sequence[str], fault: str, rank: int, step: int, *, restarts: int, timeout: float = TIMEOUT
) -> tuple[Trial, bool]:
    """`qtemper ARGUMENTS` under torchrun with two processes, of which one meets a fault, and whether it did."""
    with scratch() as place:
        happened = place / "happened"
        trial = _torchrun([fault, str(rank), str(step), *arguments], happened, restarts, timeout)
        return trial, happened.exists()


def _torchrun(arguments: Sequence[str], happened: Path, restarts: int, timeout: float) -> Trial:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    program = ["-m", "benchmarks.faults.rank"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *launcher, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULTS_HAPPENED": str(happened)},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return Trial(process.returncode, out, err, time.monotonic() - started, 0)


def curve(run: Path) -> list[dict[str, object]]:
    """Every line of `metrics.jsonl`, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
