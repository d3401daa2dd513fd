"""The `qtemper` command: train, evaluate, export, compare, sweep, recipes."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qtemper.errors import IN_USE_EXIT, ConfigError, InUseError

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
        integer: also evaluate its integer form, which is what a device computes.
        bits: other bits to evaluate the trained network at, too, without training: W3 for the weights, W3A8 for both.
        batch_norm: with --bits, re-estimate batch norm's statistics; else they stay as trained.
        as_json: print one JSON object.
    """

    run_directory: Annotated[Positional[Path], arg(name="run")]
    data: Path | None = None
    integer: bool = False
    bits: tuple[str, ...] = ()
    batch_norm: bool = False
    as_json: Annotated[bool, arg(name="json")] = False

    def run(self) -> None:
        """Do it."""
        from qtemper import evaluation
        from qtemper.run import RunDir

        run = RunDir.open(self.run_directory)
        result = evaluation.evaluate_run(run, self.data, bits=self.bits, batch_norm=self.batch_norm)
        if self.integer:
            from qtemper import deploy

            result["integer_top1"] = deploy.integer_top1(run, self.data)
        if self.as_json:
            print(json.dumps(result))
            return
        print_result(result)
        for bits, top1 in result.get("top1_at", {}).items():
            print(f"at {bits:<6} {top1:.2f}%")


@dataclass(frozen=True)
class Export:
    """Write a run's network as an ONNX file of integers, and prove that it computes what the integer model computes.

    Attributes:
        run_directory: the run directory.
        out: the file; the proof goes beside it, as FILE.report.json.
        target: onnxruntime, onnxruntime-int8, openvino, tensorrt or qonnx.
        data: directory of the data set; the training's own if not given.
        images: test images whose top-1 is compared; all if not given.
    """

    run_directory: Annotated[Positional[Path], arg(name="run")]
    out: Path
    target: str = "onnxruntime"
    data: Path | None = None
    images: int | None = None

    def run(self) -> None:
        """Do it."""
        from qtemper import deploy
        from qtemper.errors import optional_module
        from qtemper.run import RunDir

        for module in ("onnxscript", "onnxruntime"):
            optional_module(module, "export")
        run = RunDir.open(self.run_directory)
        report = deploy.export_run(run, self.out, target=self.target, data=self.data, images=self.images)
        print(report.table())


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
    columns = [
        ("float_top1", "float"),
        ("calibrated_top1", "after calibration"),
        ("top1", "after training"),
        ("integer_top1", "in integers"),
    ]
    shown = [(label, f"{result[key]:.2f}%") for key, label in columns if key in result]
    stages = [(stage["bits"], f"{stage['top1']:.2f}%") for stage in result.get("stages", [])]
    shown = [*shown[:1], *stages, *shown[1:]]
    widths = [max(len(a), len(b)) for a, b in shown]
    print("top-1   " + "   ".join(label.rjust(w) for (label, _), w in zip(shown, widths, strict=True)))
    print("        " + "   ".join(value.rjust(w) for (_, value), w in zip(shown, widths, strict=True)))


def main() -> None:
    """Entry point: parse, run, and turn every bad input into one line and exit code 2 (in use: 4, diverged: 3)."""
    from qtemper.compare.commands import Compare, Sweep
    from qtemper.train import DivergedError, ProcessLostError
    from qtemper.train.metrics import DIVERGED_EXIT

    command = tyro.extras.subcommand_cli_from_dict(
        {
            "train": Train,
            "evaluate": Evaluate,
            "export": Export,
            "compare": Compare,
            "sweep": Sweep,
            "recipes": Recipes,
        },
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
        sys.exit(IN_USE_EXIT if isinstance(error, InUseError) else 2)


if __name__ == "__main__":
    main()
