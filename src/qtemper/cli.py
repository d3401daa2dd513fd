"""The `qtemper` command: train, evaluate, compare, recipes."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qtemper.errors import ConfigError, nearest

try:
    import tyro
    from tyro.conf import Positional, UseAppendAction, arg
except ModuleNotFoundError as missing:  # the command needs an extra; the library does not
    sys.exit(f"the qtemper command needs {missing.name}: pip install 'qtemper[train]'")


@dataclass(frozen=True)
class Train:
    """Train a recipe.

    Attributes:
        recipe: name of the recipe; `qtemper recipes` lists them.
        data: directory of the data set.
        init: float checkpoint to start from (.safetensors).
        out: run directory; a dated one under runs/ if not given.
        assignments: change a field of the recipe, path=value; may be given several times.
        resume: continue the run in --out from its newest sound checkpoint.
    """

    recipe: Positional[str]
    data: Path | None = None
    init: Path | None = None
    out: Path | None = None
    assignments: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="PATH=VALUE")] = ()
    resume: bool = False

    def run(self) -> None:
        """Do it."""
        from qtemper import pipeline
        from qtemper.config import override
        from qtemper.recipes import get_recipe
        from qtemper.run import RunDir
        from qtemper.train import TrainingInterrupted

        experiment = override(get_recipe(self.recipe), list(self.assignments))
        # torchrun --max-restarts runs the same command again after a failure.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and self.out is not None
        resume = self.resume or (restarted and (Path(str(self.out)) / "config.json").exists())
        if resume:
            if self.out is None:
                raise ConfigError("--resume needs the run directory: --out RUN.")
            run = RunDir.open(self.out)
            run.require_same(experiment)
        else:
            if self.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError("several processes need one run directory: give it with --out RUN.")
            run = RunDir(self.out) if self.out is not None else RunDir.dated(experiment.name)
        try:
            result = pipeline.train(experiment, run, data=self.data, init=self.init, resume=resume)
        except TrainingInterrupted as stop:
            print(f"{stop} Continue with the same command and --out {run.path} --resume.", file=sys.stderr)
            sys.exit(128 + stop.signum)
        if int(os.environ.get("RANK", "0")) == 0:
            print_result(result)
            print(f"results are in {run.path}")


@dataclass(frozen=True)
class Evaluate:
    """Test accuracy of a trained run.

    Attributes:
        run_directory: the run directory.
        data: directory of the data set; the training's own if not given.
        as_json: print one JSON object.
    """

    run_directory: Annotated[Positional[Path], arg(name="run")]
    data: Path | None = None
    as_json: Annotated[bool, arg(name="json")] = False

    def run(self) -> None:
        """Do it."""
        from qtemper import pipeline
        from qtemper.run import RunDir

        result = pipeline.evaluate_run(RunDir.open(self.run_directory), self.data)
        if self.as_json:
            print(json.dumps(result))
        else:
            print_result(result)


@dataclass(frozen=True)
class Compare:
    """Run a grid of methods, bits, settings and seeds under one recipe; print and write its table.

    The same command goes on where it stopped. The first seed of every arm runs before the second of any.

    Attributes:
        recipe: name of the recipe that all runs share.
        out: directory of the comparison; several grids may share it.
        vary: an axis, path=value,value (`bits=W2A2,W1A1` for the policy); several make a product.
        arm: one more arm, "label: path=value; path=value".
        assignments: change a field of the recipe for all runs, path=value.
        seeds: of the runs.
        baseline: label of the arm that the others are compared with.
        data: directory of the data set.
        init: float checkpoint that all runs start from.
        jobs: runs at once.
        threads: CPU threads of each.
        status: only say what is done, what is under way, and when it will end.
        record: append the ended runs to this file of JSON lines.
    """

    recipe: Positional[str]
    out: Path
    vary: UseAppendAction[tuple[str, ...]] = ()
    arm: UseAppendAction[tuple[str, ...]] = ()
    assignments: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="PATH=VALUE")] = ()
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    data: Path | None = None
    init: Path | None = None
    jobs: int = 1
    threads: int = 1
    status: bool = False
    record: Path | None = None

    def run(self) -> None:
        """Do it."""
        from qtemper.compare import grid, record, report, schedule
        from qtemper.data.images import optional_module

        optional_module("scipy.stats", "compare")  # before the runs, not at the table after them
        arms = grid.make_arms(list(self.vary), list(self.arm))
        runs = grid.make_runs(self.recipe, list(self.assignments), arms, list(self.seeds))
        if self.baseline is not None and self.baseline not in {a.label for a in arms}:
            raise ConfigError(
                f"--baseline {self.baseline!r} is no arm; {nearest(self.baseline, [a.label for a in arms])}"
            )
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not self.status:
            options = schedule.Options(self.out, self.data, self.init, self.jobs, self.threads)
            schedule.run_all(runs, options, lambda text: print(text, flush=True))
        records = [record.read(run, self.out) for run in runs]
        if self.record is not None:
            record.append_lines(records, self.record)
        if self.status:
            print(report.status(records, self.jobs))
        else:
            report.write(records, self.baseline, self.out)
        print(report.table(records, self.baseline))


@dataclass(frozen=True)
class Recipes:
    """List the recipes, or show one: every line is a path that --set takes.

    Attributes:
        name: recipe to show.
    """

    name: Positional[str] = ""

    def run(self) -> None:
        """Do it."""
        from qtemper import recipes
        from qtemper.config import flatten, to_dict

        if not self.name:
            print("\n".join(recipes.available()))
            return
        for path, value in flatten(to_dict(recipes.get_recipe(self.name))).items():
            print(f"{path} = {json.dumps(value)}")


def print_result(result: dict[str, Any]) -> None:
    """The accuracies side by side."""
    columns = [("float_top1", "float"), ("calibrated_top1", "after calibration"), ("top1", "after training")]
    shown = [(label, f"{result[key]:.2f}%") for key, label in columns if key in result]
    stages = [(stage["bits"], f"{stage['top1']:.2f}%") for stage in result.get("stages", [])]
    shown = [*shown[:1], *stages, *shown[1:]]
    widths = [max(len(a), len(b)) for a, b in shown]
    print("top-1   " + "   ".join(label.rjust(w) for (label, _), w in zip(shown, widths, strict=True)))
    print("        " + "   ".join(value.rjust(w) for (_, value), w in zip(shown, widths, strict=True)))


def main() -> None:
    """Entry point: parse, run, and turn every bad input into one line and exit code 2."""
    from qtemper.train import DivergedError, ProcessLostError
    from qtemper.train.metrics import DIVERGED_EXIT

    command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "evaluate": Evaluate, "compare": Compare, "recipes": Recipes},
        prog="qtemper",
        description=inspect.getdoc(sys.modules[__name__]),
    )
    try:
        command.run()
    except KeyboardInterrupt:
        print("qtemper: stopped by SIGINT.", file=sys.stderr)
        sys.exit(130)
    except DivergedError as error:
        print(f"qtemper: {error}", file=sys.stderr)
        sys.exit(DIVERGED_EXIT)
    except (ValueError, ProcessLostError, ModuleNotFoundError) as error:
        print(f"qtemper: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
