"""`python -m benchmarks.gpu_table`: the full tables, 400 epochs of ResNet-20 on CIFAR, in slices on a CUDA card.

    python -m benchmarks.gpu_table --data DATA --out OUT --jobs 8 --stop-after 540

The grid is methods x bits x seeds, every run EWGS's published recipe of `qtemper.recipes.cifar`, from one float network
that the first slices train. `--jobs` runs share the card, one process each; each holds the whole data set on it, as
bytes (180 MB). After `--stop-after` seconds they write checkpoints, and the tables are printed as far as they are. The
same command goes on; what it needs for that is OUT, which may be moved to another machine in between. CIFAR-10 and
CIFAR-100 (`--dataset`) are two commands, which may run side by side.

- Time: a run that has not ended `qtemper.compare.schedule.GRACE` seconds after it was asked to is killed, and repeats a
  little: give `--stop-after` that much less than the machine gives. torch.compile does its work again in every slice
  unless TORCHINDUCTOR_CACHE_DIR names a folder that stays.
- Size: OUT takes 1 MB for each finished run, whose checkpoints and copy of the float network are deleted, and 8 MB
  for each one under way. If it is too large to carry, do one seed (or method, or number of bits) after another.
- Packages: torch>=2.6, numpy, and from the extra `compare`: lightning-fabric, safetensors, tyro, rich, pillow (for the
  webp layout), scipy. Without a network, put a folder that `pip install --target` made elsewhere on PYTHONPATH; of
  lightning-fabric, which names torch, `--no-deps`, and lightning-utilities beside it. qtemper itself: `src` on it.
- Data: DATA is the folder that `load_cifar` reads, or its parent. A folder of 97 MB that can be carried in two parts
  only: copy the files of both into one folder there (`cp part1/* part2/* DATA/`), and give that. What is missing is
  named before anything is trained.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qtemper.compare import record, report, schedule
from qtemper.compare.grid import Arm, Run, make_runs, settings
from qtemper.compare.launch import LocalProcesses, Options
from qtemper.data import open_source
from qtemper.errors import ConfigError, optional_module
from qtemper.methods import available

METHODS = ("ste", "lsq", "ewgs", "tempering")
BITS = ("W1A1", "W2A2", "W4A4")


@dataclass(frozen=True)
class Grid:
    """What a table holds.

    Attributes:
        dataset: cifar10, cifar100, or digits, which only tries the script out.
        methods: the first is the one that the others are compared with.
        bits: a table for each.
        seeds: of the quantized runs; the float network has seed 0.
        assignments: as `--set` takes them, for every run.
    """

    dataset: str
    methods: tuple[str, ...]
    bits: tuple[str, ...]
    seeds: tuple[int, ...]
    assignments: tuple[str, ...] = ()

    def float_run(self) -> Run:
        """The training of the float network."""
        if self.dataset == "digits":
            return self._run("digits-w2a2-tempering", "float", ("method=null",), 0)
        return self._run(f"{self.dataset}-resnet20-float", "float", (), 0)

    def runs(self) -> list[Run]:
        """The quantized runs, the first seed of all before the second of any."""
        return [self._quantized(b, m, s) for s in self.seeds for b in self.bits for m in self.methods]

    def _quantized(self, bits: str, method: str, seed: int) -> Run:
        label = f"{method} {bits}"
        if self.dataset == "digits":
            return self._run("digits-w2a2-tempering", label, (f"method={method}", f"bits={bits}"), seed)
        return self._run(f"{self.dataset}-resnet20-{bits.lower()}-{method}-400ep", label, (), seed)

    def _run(self, recipe: str, label: str, own: tuple[str, ...], seed: int) -> Run:
        (run,) = make_runs(recipe, [], [Arm(label, tuple(settings((*own, *self.assignments))))], [seed])
        return run


def fill(grid: Grid, options: Options, jobs: int, stop_after: float, say: Callable[[str], None]) -> bool:
    """Train for so many seconds.

    Args:
        grid: what.
        options: where, with which data; if it names no float network, one is trained.
        jobs: processes at once.
        stop_after: seconds.
        say: takes a line for every run that starts or ends.

    Returns:
        Whether everything has ended.

    Raises:
        ConfigError: the float network diverged or failed.
        Stopped: on Ctrl-C or SIGTERM.
    """
    until = time.monotonic() + stop_after
    network = options.init
    if network is None:
        run = grid.float_run()
        pool = schedule.Pool(LocalProcesses(options), options.root, 1, say)
        schedule.run_all([run], pool, stop_after)
        found = record.read(run, options.root)
        if found.state in ("diverged", "failed"):
            raise ConfigError(f"the float network {found.state}: {found.outcome.get('message')}")
        if found.state != "done":
            return False
        network = run.directory(options.root) / "final.safetensors"
    launcher = LocalProcesses(Options(options.root, options.data, network, options.threads))
    pool = schedule.Pool(launcher, options.root, jobs, say)
    return schedule.run_all(grid.runs(), pool, until - time.monotonic())


def show(grid: Grid, root: Path) -> str:
    """The tables as far as they are, one for each number of bits; they are in `OUT/tables.md`, too."""
    parts = []
    float_record = record.read(grid.float_run(), root)
    if float_record.state == "done":
        parts.append(f"float: {float_record.result['top1']:.2f}%")
    for bits in grid.bits:
        found = [record.read(run, root) for run in grid.runs() if run.arm.label.endswith(f" {bits}")]
        parts.append(report.table(found, f"{grid.methods[0]} {bits}"))
    text = "\n\n".join(parts)
    (root / "tables.md").write_text(text + "\n")
    return text


def tidy(grid: Grid, root: Path) -> None:
    """Delete what finished runs no longer need: their checkpoints and their copies of the float network."""
    for run in (grid.float_run(), *grid.runs()):
        if record.read(run, root).state == "done":
            shutil.rmtree(run.directory(root) / "checkpoints", ignore_errors=True)
            (run.directory(root) / "float.safetensors").unlink(missing_ok=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the table; the same one goes on")
    parser.add_argument("--data", type=Path, help="directory of the data set")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100", "digits"), default="cifar10")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=available(), metavar="METHOD")
    parser.add_argument("--bits", nargs="+", default=BITS, metavar="BITS")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for every run")
    parser.add_argument("--init", type=Path, help="float network, if one is there already")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--stop-after", type=float, default=540, help="seconds")
    parser.add_argument("--record", type=Path, help="append the ended runs to this file of JSON lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    grid = Grid(given.dataset, tuple(given.methods), tuple(given.bits), tuple(given.seeds), tuple(given.set))
    try:
        optional_module("scipy.stats", "compare")
        if given.dataset != "digits" and not torch.cuda.is_available():
            say("no CUDA device is visible: on a CPU these runs take days")
        if given.record is not None:
            record.read_keys(given.record)
        runs = grid.runs()
        open_source(runs[0].experiment.data, given.data)
        finished = fill(grid, Options(given.out, given.data, given.init), given.jobs, given.stop_after, say)
    except schedule.Stopped as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}; the same command goes on.", file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, ModuleNotFoundError) as error:
        print(f"gpu_table: {error}", file=sys.stderr)
        return 2
    tidy(grid, given.out)
    records = [record.read(run, given.out) for run in runs]
    if given.record is not None:
        record.append_lines(records, given.record)
    print(show(grid, given.out))
    if not finished:
        print(report.goes_on(records))
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
