"""`qtemper compare` and `qtemper sweep`: their options."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from qtemper.errors import ConfigError, nearest

if TYPE_CHECKING:
    from qtemper.compare import schedule


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """What the two commands have in common: one recipe, many runs, and how they are started.

    Attributes:
        recipe: name of the recipe that all runs share.
        out: directory of the runs and their table.
        assignments: change a field of the recipe for all runs, path=value; `bits=W2A2` for the policy.
        data: directory of the data set.
        init: float checkpoint that all runs start from.
        jobs: runs at once.
        threads: CPU threads of each.
        slurm: submit the runs to a Slurm cluster with these parameters of submitit and sbatch, name=value:
            timeout_min=60 partition=gpu gpus_per_node=1. --out must be on a file system that the nodes share, and
            --jobs says how many may be submitted at once. A job whose time is up is requeued and goes on. Ctrl-C ends
            the jobs; if this command is killed they go on, and the same command takes them over.
        stop_after: seconds after which the runs write checkpoints and end; the table is printed as far as it is.
        status: start nothing; say how far the runs are, and print the table.
    """

    recipe: Positional[str]
    out: Path
    assignments: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="PATH=VALUE")] = ()
    data: Path | None = None
    init: Path | None = None
    jobs: int = 1
    threads: int = 1
    slurm: tuple[str, ...] = ()
    stop_after: float | None = None
    status: bool = False

    def _check(self) -> None:
        for name in ("jobs", "threads", "trials"):
            if getattr(self, name, 1) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.stop_after is not None and not self.stop_after > 0:
            raise ConfigError(f"--stop-after must be more than 0 seconds, got {self.stop_after}.")

    def _pool(self) -> schedule.Pool:
        """How the runs are started."""
        from qtemper.compare import schedule
        from qtemper.compare.launch import Launcher, LocalProcesses, Options
        from qtemper.compare.slurm import SubmititJobs

        options = Options(self.out, self.data, self.init, self.threads)
        launcher: Launcher = SubmititJobs(options, list(self.slurm)) if self.slurm else LocalProcesses(options)
        return schedule.Pool(launcher, self.out, self.jobs, lambda text: print(text, flush=True))


@dataclass(frozen=True, kw_only=True)
class Compare(_Runs):
    """Run a grid of methods, bits, settings and seeds under one recipe; print and write its table.

    The same command goes on where it stopped. The first seed of every arm runs before the second of any. A run that
    diverged is a result; one that failed ends the command with exit code 1.

    Attributes:
        vary: an axis, path=value,value (`bits=W2A2,W1A1` for the policy); several make a product.
        arm: one more arm, "label: path=value; path=value".
        arms_from: a file with more arms, one a line; a line that begins with # is a comment.
        seeds: of the runs.
        baseline: label of the arm that the others are compared with.
        record: append the ended runs to this file of JSON lines.
    """

    vary: UseAppendAction[tuple[str, ...]] = ()
    arm: UseAppendAction[tuple[str, ...]] = ()
    arms_from: Path | None = None
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    record: Path | None = None

    def run(self) -> None:
        """Do it."""
        from qtemper.compare import grid, record, report, schedule
        from qtemper.errors import optional_module
        from qtemper.run import RunDir

        optional_module("scipy.stats", "compare")  # before the runs, not at the table after them
        more = [] if self.arms_from is None else grid.read_arms(self.arms_from)
        arms = grid.make_arms(list(self.vary), [*self.arm, *more])
        runs = grid.make_runs(self.recipe, list(self.assignments), arms, list(self.seeds))
        if self.baseline is not None and self.baseline not in {a.label for a in arms}:
            raise ConfigError(
                f"--baseline {self.baseline!r} is no arm; {nearest(self.baseline, [a.label for a in arms])}"
            )
        self._check()
        if self.record is not None:
            record.read_keys(self.record)  # before the runs, not after them
        finished = True
        if not self.status:
            RunDir(self.out).make()
            record.require_same_start(runs, self.out, self.init)
            finished = _until_signal(lambda: schedule.run_all(runs, self._pool(), self.stop_after))
        records = [record.read(run, self.out) for run in runs]
        if self.status:
            print(report.status(records, self.jobs))
        else:
            report.write(records, self.baseline, self.out)
        print(report.table(records, self.baseline))
        if not finished:
            print(report.goes_on(records))
        if self.record is not None:
            added, there = record.append_lines(records, self.record)
            print(f"{added} runs added to {self.record}, {there} were there")
        if any(r.state == "failed" for r in records):
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Sweep(_Runs):
    """Search for the settings of a recipe that give the best accuracy; print and write the table of trials.

    The same command goes on where it stopped. Trials are proposed by Optuna (TPE), or are all combinations where there
    are no more of them than trials. They are judged by training images that are held out, 10,000 of CIFAR's unless
    `--set data.held_out=N` says otherwise, and by the test set only with `--set data.held_out=0`, which ImageNet needs:
    none of its images can be held out. A float network that was trained with those images has seen them: train one
    with the same `--set data.held_out=N`.

    Attributes:
        search: what to vary, path=low..high, path=low..high:log or path=value,value; whole numbers if both ends are.
        trials: how many.
        seed: of the search and of every run.
        prune: end a trial early that is below the median of the others at the same epoch, in the last two thirds.
    """

    search: UseAppendAction[tuple[str, ...]] = ()
    trials: int = 10
    seed: int = 0
    prune: bool = True

    def run(self) -> None:
        """Do it."""
        from qtemper.compare import record, report, schedule, search, sweep
        from qtemper.errors import optional_module
        from qtemper.run import RunDir

        optional_module("optuna", "sweep")
        axes = search.parse(list(self.search))
        plan = sweep.plan_search(
            self.recipe, list(self.assignments), axes, trials=self.trials, seed=self.seed, prune=self.prune
        )
        self._check()
        judged_by = sweep.judged_by(plan)
        if self.status:
            if not (self.out / sweep.JOURNAL).exists():
                raise ConfigError(f"there is no sweep in {self.out}; start it with the same command without --status.")
            print(report.trials(sweep.Sweep(plan, self.out).records(), judged_by))
            return
        pool = self._pool()
        with RunDir(self.out).lock():  # two commands would continue each other's trials
            study = sweep.Sweep(plan, self.out)
            record.require_same_start([r.run for r in study.records().values()], self.out, self.init)
            study.prepare()
            finished = _until_signal(lambda: schedule.drive(pool, lambda: study.turn(pool), self.stop_after))
            records = study.records()
            report.write_trials(records, judged_by, self.out)
        print(report.trials(records, judged_by))
        if not finished:
            print(report.goes_on(list(records.values())))


def _until_signal(work: Callable[[], bool]) -> bool:
    """Do the work; Ctrl-C and SIGTERM end the command as they end `qtemper train`."""
    from qtemper.compare.schedule import Stopped

    try:
        return work()
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        print(f"qtemper: stopped by {name}; the same command goes on.", file=sys.stderr)
        sys.exit(128 + stop.signum)
