"""Rows: what has to be refused, and before anything is touched."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import tiny
from benchmarks.faults.driver import Child, after_steps, command, epochs, scratch, signal_self, start
from benchmarks.faults.groups import Group, curve, run_group
from benchmarks.faults.rows_damage import finished, fresh_state, reseal
from benchmarks.faults.rows_kill import reference, same_end, wait_until
from benchmarks.faults.table import Row, counted, row

from qtemper.errors import IN_USE_EXIT, CheckpointError
from qtemper.train.state import load_checkpoint

# --- resume under other circumstances ------------------------------------------------------------------------------

CHANGED = {
    "train.epochs": "5",
    "train.batch_size": "64",
    "train.optim.lr": "0.5",
    "train.optim.schedule": "linear",
    "method": "lsq",
    "policy.weight": "4",
    "data.padding": "2",
    "seed": "3",
}


def other_setting(run: Path, path: str) -> str | None:
    """The command, resumed with one more --set."""
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    trial = start(command(run, f"{path}={CHANGED[path]}", resume=True)).wait()
    if not trial.clear or path not in trial.err:
        return f"{path}: exit code {trial.code}: {trial.err.strip()[-300:]}"
    return None if before == sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) else f"{path}: touched the run"


def edited(run: Path, change: dict[str, object], words: list[str]) -> str | None:
    """A checkpoint of something else, in the same process that would go on with it."""
    with scratch() as folder:
        shutil.copytree(run, folder / "run")
        state = fresh_state(folder / "run")
        state.config = {"train": {"optim": {"lr": 0.5}}}
        for path in (folder / "run" / "checkpoints").iterdir():
            document = json.loads((path / "state.json").read_text())
            (path / "state.json").write_text(json.dumps(document | change))
            reseal(path)
        try:
            load_checkpoint(folder / "run" / "checkpoints", state)
        except CheckpointError as error:
            missing = [word for word in words if word not in str(error)]
            return f"{change}: {error} does not name {missing}" if missing else None
    return f"{change}: accepted"


def other_world_size(before: int, now: int) -> list[str]:
    """A run that was stopped, resumed with another number of processes; then so in the elastic mode."""
    wrong = []
    with scratch() as folder:
        run = folder / "run"
        stop = (tiny.STEPS + 2) * tiny.OPTIMIZERS
        Group(tiny.tiny(run), lambda _: after_steps(stop, signal_self(signal.SIGTERM)), size=before).wait()
        files = sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*"))
        trial = run_group(tiny.tiny(run, resume=True), size=now)
        words = (f"by {before} process(es), and {now} would continue", "torchrun", "QTEMPER_ELASTIC")
        if trial.code != 2 or not all(word in trial.err for word in words):
            wrong.append(f"{before} -> {now}: exit code {trial.code}: {trial.err.strip()[-300:]}")
        if files != sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*")):
            wrong.append(f"{before} -> {now}: touched the checkpoints")
        trial = run_group(tiny.tiny(run, resume=True), size=now, settings={"QTEMPER_ELASTIC": "1"})
        if trial.code != 0 or "going on, as QTEMPER_ELASTIC asks" not in trial.out:
            wrong.append(f"{before} -> {now}, elastic: exit code {trial.code}: {trial.err.strip()[-300:]}")
        elif [line["step"] for line in curve(run)] != [line["step"] for line in tiny.reference(now).curve]:
            wrong.append(f"{before} -> {now}, elastic: steps are missing from metrics.jsonl")
    return wrong


@row
def changed_on_resume() -> Row:
    """Eight settings through the command; configuration, world size, version and format in the checkpoint itself.

    And stopped runs of one process continued by two, of two by one, which the elastic mode lets pass.
    """
    run = finished()
    cases: list[Callable[[], str | None]] = [lambda path=path: other_setting(run, path) for path in CHANGED]
    old = {"train": {"optim": {"lr": 0.25}}}
    cases += [
        lambda: edited(run, {"config_hash": "x", "config": old}, ["train.optim.lr: 0.25, now 0.5"]),
        lambda: edited(run, {"world_size": 2}, ["2 process", "1 would", "torchrun"]),
        lambda: edited(run, {"qtemper": "0.0.9"}, ["0.0.9", "install that version"]),
        lambda: edited(run, {"format": 99}, ["format 99"]),
    ]
    failures = [wrong for case in cases if (wrong := case())]
    sizes = [other_world_size(before, now) for before, now in ((1, 2), (2, 1))]
    elastic = [line for wrong in sizes for line in wrong]
    result = counted(
        "world size, config or code version changed on resume",
        "refused with the difference, or the documented elastic mode",
        "",
        failures,
        len(cases),
    )
    result.figure += f"; 1 to 2 processes and back, refused, then elastic: {sum(not w for w in sizes)} / {len(sizes)}"
    result.failures += elastic
    result.passed &= not elastic
    return result


# --- two runs ------------------------------------------------------------------------------------------------------

LONG = ("train.epochs=12",)


@row
def two_runs_on_one_directory() -> Row:
    """A second process, new or with --resume, while the first trains; then one after a kill -9, which must go on."""
    failures = []
    with scratch() as folder:
        run = folder / "run"
        first = start(command(run, *LONG))
        wait_until(first, run / "checkpoints")
        for resume in (True, False):
            trial = start(command(run, *LONG, resume=resume)).wait()
            if not trial.clear or "in use" not in trial.err:
                failures.append(f"resume={resume}: exit code {trial.code}: {trial.err.strip()[-300:]}")
        first.kill()
        killed = first.wait()
        if killed.code == 0:
            failures.append("the first was through before the second came")
        trial = start(command(run, *LONG, resume=True)).wait()
        wrong = same_end(run, trial, *LONG)
        failures += [f"after the kill: {wrong}"] if wrong else []
        if (run / ".lock").exists():
            failures.append(".lock is left")
    with scratch() as folder:
        run = folder / "run"
        pair = [start(command(run)) for _ in range(2)]  # at the same moment
        codes = sorted(child.wait().code for child in pair)
        if codes != [0, IN_USE_EXIT] or str(epochs(run)) != reference()[1]:
            failures.append(f"started together: exit codes {codes}")
    return Row("two runs on one directory", "the second refuses", "no" if failures else "yes", not failures, failures)


# --- wrong configurations ------------------------------------------------------------------------------------------

TYPOS = {
    "train.epoch": "train.epochs",
    "train.batchsize": "train.batch_size",
    "train.optim.learning_rate": "train.optim",
    "train.optim.mometum": "train.optim.momentum",
    "train.optim.weigth_decay": "train.optim.weight_decay",
    "train.optim.quantiser_lr": "train.optim.quantizer_lr",
    "train.optim.clip_nrom": "train.optim.clip_norm",
    "train.loss.label_smooth": "train.loss.label_smoothing",
    "train.loss.destillation": "train.loss.distillation",
    "train.precison": "train.precision",
    "train.chanels_last": "train.channels_last",
    "train.log_evry": "train.log_every",
    "float_train.epoch": "float_train.epochs",
    "model.num_class": "model.num_classes",
    "model.archi": "model.arch",
    "policy.weights": "policy.weight",
    "policy.activations": "policy.activation",
    "calibration.observe": "calibration.observer",
    "data.normalisation": "data.normalization",
    "sed": "seed",
}
"""What is typed and the nearest path, which the message must name."""

WRONG = {
    "train.epochs=0": "train: epochs",
    "train.epochs=2.5": "train.epochs",
    "train.epochs=many": "train.epochs",
    "train.batch_size=-1": "batch_size",
    "train.optim.lr=-0.1": "lr",
    "train.optim.lr=1e999": "train.optim.lr",
    "train.optim.lr=NaN": "train.optim.lr",
    "train.optim.optimizer=sdg": "train.optim.optimizer",
    "train.optim.schedule=cosin": "'cosine'",
    "train.precision=bf61": "train.precision",
    "train.loss.label_smoothing=2": "label_smoothing",
    "train.channels_last=maybe": "train.channels_last",
    "method=temperin": "'tempering'",
    "method=[]": "method",
    "policy.weight=9": "policy",
    "policy.weight=two": "policy.weight",
    "model.arch=smal": "model",
    "data.name=digit": "data.name",
    "data.source=folder": "source",
    "seed=-1": "seed",
}
"""A path with a value of the wrong kind or out of range, and what the message must name."""


def touches_data() -> None:
    """In a child: leave a mark on reading data or waking a GPU."""
    import torch

    from qtemper import data, pipeline
    from qtemper.data import digits

    def touched(*_: object, **__: object) -> None:
        raise SystemExit("DATA OR GPU TOUCHED")

    for module in (data, digits, pipeline):
        for name in ("load", "load_digits", "open_source"):
            if hasattr(module, name):
                setattr(module, name, touched)
    torch.cuda._lazy_init = touched


@row
def wrong_configurations() -> Row:
    """20 mistyped paths and 20 wrong values."""
    failures = []
    for words, needs in [*((f"{typo}=1", right) for typo, right in TYPOS.items()), *WRONG.items()]:
        with scratch() as folder:
            child: Child = start(command(folder / "run", words), touches_data)
            trial = child.wait()
            made = (folder / "run").exists()
        if not trial.clear or needs not in trial.err or made:
            failures.append(f"{words}: exit code {trial.code}, run directory made: {made}: {trial.err.strip()[-200:]}")
    tried = len(TYPOS) + len(WRONG)
    return counted(
        "40 wrong configs",
        "exit before data or GPU is touched, naming key and nearest match",
        "rejected",
        failures,
        tried,
    )
