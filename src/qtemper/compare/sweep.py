"""A search for good settings: Optuna proposes trials, each of which is a run like those of a comparison.

What has been tried is in `journal.log`, Optuna's journal storage, and in the runs' directories; the command can be
killed at any moment and goes on from there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtemper.compare.grid import Arm, Run, settings
from qtemper.compare.record import Record, read
from qtemper.compare.schedule import Pool
from qtemper.compare.search import Axis, Choice, spread
from qtemper.config import override
from qtemper.errors import ConfigError, optional_module
from qtemper.recipes import get_recipe

HELD_OUT = {"cifar10": 10_000, "cifar100": 10_000, "digits": 287}
"""Training images that trials are judged by, a fifth of them, where nothing else is asked for."""

JOURNAL = "journal.log"
"""Optuna's file in the sweep's directory."""

STARTUP = 4
"""Trials that are spread evenly before Optuna proposes, and that end before others are pruned by them."""


@dataclass(frozen=True)
class Search:
    """What a sweep does.

    Attributes:
        recipe: name of the recipe.
        assignments: of all trials, for `config.override`.
        axes: what is searched.
        trials: how many.
        seed: of the search and of every run.
        prune: whether a trial ends early that is below the median of the others at the same epoch.
    """

    recipe: str
    assignments: tuple[str, ...]
    axes: tuple[Axis, ...]
    trials: int = 10
    seed: int = 0
    prune: bool = True

    def run(self, values: list[str]) -> Run:
        """The run of a trial.

        Raises:
            ConfigError: a value does not fit the recipe.
        """
        chosen = tuple(f"{axis.path}={value}" for axis, value in zip(self.axes, values, strict=True))
        assignments = (*self.assignments, *settings(chosen))
        experiment = override(get_recipe(self.recipe), [*assignments, f"seed={self.seed}"])
        return Run(Arm(" ".join(chosen), assignments), self.seed, self.recipe, experiment)


def plan_search(
    recipe: str, assignments: list[str], axes: list[Axis], *, trials: int = 10, seed: int = 0, prune: bool = True
) -> Search:
    """A plan whose every axis fits the recipe, and whose trials are judged by training images that are held out.

    Raises:
        ConfigError: an unknown recipe or field, a value that does not fit, or a data set that can hold none out, unless
            the assignments say `data.held_out=0`.
    """
    assignments = settings(assignments)
    start = override(get_recipe(recipe), assignments)
    if not any(text.partition("=")[0].strip() == "data.held_out" for text in assignments) and not start.data.held_out:
        if start.data.name not in HELD_OUT:
            raise ConfigError(
                f"{start.data.name} can hold out no training images, so its test images would judge the trials; "
                "search with a recipe of another data set, or accept it with --set data.held_out=0."
            )
        assignments = [*assignments, f"data.held_out={HELD_OUT[start.data.name]}"]
    plan = Search(recipe, tuple(assignments), tuple(axes), trials, seed, prune)
    first = [axis.corners()[0] for axis in axes]
    for i, axis in enumerate(axes):
        for value in axis.corners():
            try:  # without the later axes, whose errors are not this one's
                replace(plan, axes=tuple(axes[: i + 1])).run([*first[:i], value])
            except ConfigError as error:
                raise ConfigError(f"--search {axis.path}: {error}") from None
    return plan


def judged_by(plan: Search) -> str:
    """What a trial's accuracy is measured on, in words."""
    held_out = plan.run([axis.corners()[0] for axis in plan.axes]).experiment.data.held_out
    if held_out:
        return f"{held_out:,} training images that were held out"
    return "the TEST images, so the best trial's accuracy is no test accuracy; hold some out with data.held_out"


class Sweep:
    """The trials of a plan, as far as they got.

    Args:
        plan: what to do.
        root: the sweep's directory.

    Raises:
        ConfigError: the directory holds another plan's trials.
        ModuleNotFoundError: Optuna is not installed.
    """

    def __init__(self, plan: Search, root: Path) -> None:
        self.optuna = optional_module("optuna", "sweep")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.plan, self.root = plan, root
        self.runs: dict[int, Run] = {}
        journal = optional_module("optuna.storages.journal", "sweep")
        root.mkdir(parents=True, exist_ok=True)
        self.study: Any = self.optuna.create_study(
            storage=self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(root / JOURNAL))),
            study_name="sweep",
            direction="maximize",
            pruner=self._pruner(),
            load_if_exists=True,
        )
        self._require_same()
        self.under_way: list[Any] = []

    def _pruner(self) -> Any:
        if not self.plan.prune:
            return self.optuna.pruners.NopPruner()
        epochs = self.plan.run([axis.corners()[0] for axis in self.plan.axes]).experiment.train.epochs
        # Early in training, a high learning rate looks worse than it is.
        return self.optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=epochs // 3 + 1)

    def _require_same(self) -> None:
        plan = self.plan
        mine = {
            "recipe": plan.recipe,
            "assignments": list(plan.assignments),
            "search": [repr(axis) for axis in plan.axes],
            "seed": plan.seed,
        }
        for name, value in mine.items():
            there = self.study.user_attrs.get(name)
            if there is None:
                self.study.set_user_attr(name, value)
            elif there != value:
                raise ConfigError(
                    f"{self.root} holds a sweep with another {name} ({there}, now {value}); repeat its own command, or "
                    "choose another --out."
                )

    def prepare(self) -> None:
        """Take up the trials that were under way; queue those that failed, and the first or all of the others."""
        trials = self._trials()
        for trial in trials:
            if trial.state == self.optuna.trial.TrialState.RUNNING:
                self._seed(trial.number)
                # Optuna has no public way to go on with a trial of another process.
                self.under_way.append(self.optuna.Trial(self.study, trial._trial_id))
        failed = [trial for trial in trials if _failed(trial)]
        self.failed_before = len(failed)
        for trial in failed:
            later = [t.system_attrs.get("fixed_params", t.params) for t in trials if t.number > trial.number]
            if trial.params not in later:
                self.study.enqueue_trial(trial.params)
        axes = self.plan.axes
        choices = [axis.values for axis in axes if isinstance(axis, Choice)]
        count = math.prod(map(len, choices))
        if len(choices) == len(axes) and count <= self.plan.trials:
            self.target = count
            start = [dict(zip((a.path for a in axes), v, strict=True)) for v in itertools.product(*choices)]
        else:
            self.target = self.plan.trials
            start = spread(list(axes), min(STARTUP, self.target), first=self.plan.seed * STARTUP % 2**20)
        for values in start:
            self.study.enqueue_trial(values, skip_if_exists=True)

    def turn(self, pool: Pool) -> bool:
        """Follow the trials under way and start new ones; returns whether more will come."""
        for trial in list(self.under_way):
            self._follow(trial, pool)
        while pool.has_room and self._asked() < self.target:
            self._seed(len(self._trials()))
            trial = self.study.ask()
            self.under_way.append(trial)
            self._follow(trial, pool)
        return bool(self.under_way) or self._asked() < self.target

    def _seed(self, number: int) -> None:
        """Give a trial a sampler of its own: one that starts anew with the command would repeat its draws."""
        seed = (self.plan.seed * 100_003 + number) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _asked(self) -> int:
        """Trials that count: not those that failed under an earlier command."""
        waiting = self.optuna.trial.TrialState.WAITING
        return len([trial for trial in self._trials() if trial.state != waiting]) - self.failed_before

    def run(self, trial: Any) -> Run:
        """The run of a trial."""
        if trial.number not in self.runs:
            self.runs[trial.number] = self.plan.run([axis.suggest(trial) for axis in self.plan.axes])
        return self.runs[trial.number]

    def records(self) -> dict[int, Record]:
        """What the trials' runs left, by the number of the trial; of two trials that share a run, the later one."""
        found: dict[str, tuple[int, Record]] = {}
        for trial in self._trials():
            if len(trial.params) == len(self.plan.axes):
                run = self.run(self.optuna.trial.FixedTrial(trial.params, trial.number))
                found[run.config_hash] = trial.number, read(run, self.root)
        return dict(found.values())

    def _follow(self, trial: Any, pool: Pool) -> None:
        """Report a trial's new epochs; start, prune or end it."""
        run = self.run(trial)
        record = read(run, self.root)
        states = self.optuna.trial.TrialState
        known = self._trials()[trial.number].intermediate_values
        news = [(e["epoch"], e["test_top1"]) for e in record.epochs if e.get("test_top1") is not None]
        for epoch, top1 in news:
            if epoch not in known:
                trial.report(top1, epoch)
        if pool.holds(run):
            unfinished = len(record.epochs) < run.experiment.train.epochs
            if news and unfinished and trial.should_prune():
                pool.prune(run)
        elif record.ended and (record.state != "failed" or pool.tried(run)):
            if record.state == "failed" and not any(t.intermediate_values for t in self._trials()):
                raise ConfigError(f"trial {trial.number} failed before its first epoch: {record.outcome['message']}")
            self.under_way.remove(trial)
            trial.set_user_attr("outcome", record.state)
            if record.state == "done":
                self.study.tell(trial, record.result["top1"])
            else:
                state = states.PRUNED if record.state == "pruned" else states.FAIL
                self.study.tell(trial, state=state)
        elif pool.has_room:
            pool.start(run)


def _failed(trial: Any) -> bool:
    return bool(trial.user_attrs.get("outcome") == "failed")
