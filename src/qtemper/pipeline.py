"""A run from start to end: build -> load float -> prepare -> calibrate -> fit -> final.safetensors."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from qtemper.calibrate import calibrate
from qtemper.config import Experiment
from qtemper.data import NORMALIZATIONS, Source, open_source
from qtemper.errors import CheckpointError, ConfigError
from qtemper.layers import without_quantizers
from qtemper.models import build
from qtemper.prepare import prepare
from qtemper.run import RunDir
from qtemper.stages import Stage
from qtemper.train import evaluate, fit
from qtemper.train.config import require_compiler
from qtemper.train.processes import make_fabric, report_lost_process, share_state
from qtemper.weights import load_strictly, read_safetensors


def train(
    experiment: Experiment,
    run: RunDir,
    *,
    data: Path | None = None,
    init: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run an experiment; everything that can be wrong is checked before the run directory is made.

    Args:
        experiment: what to do.
        run: where it goes.
        data: the data set's directory.
        init: float checkpoint, safetensors.
        resume: continue the run.

    Returns:
        Accuracies in percent: `float_top1`, `calibrated_top1`, `top1`; with stages also `stages`, a list of the same.

    Raises:
        ValueError: any bad input; the message names the remedy.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint.
        ProcessLostError: another process died or did not answer in time.
    """
    start = run.stage(experiment.stages[0].name) if experiment.stages else run
    continues = resume and start.checkpoints.is_dir()
    if resume and not continues and init is None and start.float_weights.exists():
        init = start.float_weights  # stopped between the float network and the first checkpoint
    if not continues and experiment.method is not None and init is None and experiment.float_train is None:
        raise ConfigError(
            f"{experiment.name} starts from a float network: give one with --init FLOAT.safetensors "
            f"(a float recipe's final.safetensors, for instance)."
        )
    _check_bits(experiment, init)
    with report_lost_process(experiment.train.timeout):
        fabric = make_fabric(timeout=experiment.train.timeout)
        source = open_source(experiment.data, data, fabric.device)
        _check_fit(experiment, source)
        return _run(experiment, run, source, fabric, data, _Start(init), resume)


@dataclass(frozen=True)
class _Start:
    """What a training begins with.

    Attributes:
        init: the float network, or None: train it.
        warm: the quantized network of the stage before, whose weights and batch norm replace the float network's.
    """

    init: Path | None
    warm: Path | None = None


def _float_network(experiment: Experiment, init: Path | None) -> nn.Module:
    """The float network with the weights of `init`, or random ones."""
    torch.manual_seed(experiment.seed)
    model = build(experiment.model)
    if init is not None:
        load_strictly(model, read_safetensors(init), init)
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} in {init} has NaN or infinite values; give sound weights.")
    return model


def _check_bits(experiment: Experiment, init: Path | None) -> None:
    """Whether `init` fits, and the policy can be applied to it, in every stage."""
    model = _float_network(experiment, init)
    if experiment.method is None:
        return
    for policy in (*(stage.policy(experiment.policy) for stage in experiment.stages), experiment.policy):
        prepare(copy.deepcopy(model), experiment.method, policy)


def _run(
    experiment: Experiment,
    run: RunDir,
    source: Source,
    fabric: Fabric,
    data: Path | None,
    start: _Start,
    resume: bool,
) -> dict[str, Any]:
    """A run directory from its creation to its result, with those of its stages inside."""
    recorded = run.read_result() if resume else {}
    first = fabric.is_global_zero
    with run.lock() if first else contextlib.nullcontext():
        if first:
            if not resume:
                run.create(experiment, data, start.init)
            print(f"run directory: {run.path}")
        fabric.barrier()
        stages = []
        for stage in experiment.stages:
            part = run.stage(stage.name)
            done = part.read_result() if part.finished else None
            begun = (part.path / "config.json").exists()
            fabric.barrier()  # nobody writes there before all have looked
            result = done or _run(_of_stage(experiment, stage), part, source, fabric, data, start, begun)
            stages.append({"bits": stage.name, "epochs": stage.epochs, **result})
            start = _Start(run.stage(experiment.stages[0].name).float_weights, part.final)
        model = _float_network(experiment, start.init).to(fabric.device)
        trained = _train(experiment, run, model, source, fabric, start, resume)
        result = recorded | ({"stages": stages} if stages else {}) | trained
        if first:
            run.write_final(model, experiment)
            run.write_result(result)
        fabric.barrier()
    return result


def _of_stage(experiment: Experiment, stage: Stage) -> Experiment:
    """The experiment that a stage is: its bits and epochs, nothing after it."""
    return replace(
        experiment,
        policy=stage.policy(experiment.policy),
        stages=(),
        train=replace(experiment.train, epochs=stage.epochs),
    )


def _train(
    experiment: Experiment,
    run: RunDir,
    model: nn.Module,
    source: Source,
    fabric: Fabric,
    start: _Start,
    resume: bool,
) -> dict[str, Any]:
    options: dict[str, Any] = {"seed": experiment.seed, "fabric": fabric}
    if experiment.method is None:
        fit(model, source, experiment.train, out=run.path, resume=resume, title="float", **options)
        return {"top1": evaluate(model, source, fabric=fabric)}
    if resume and run.checkpoints.is_dir():
        result = {}
        teacher = _teacher_of(run, experiment)
        prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
    else:
        if experiment.float_train is not None and start.init is None:
            fit(model, source, experiment.float_train, title="float", **options)
        teacher = copy.deepcopy(model) if experiment.train.loss.distillation > 0 else None
        result = _quantize(experiment, run, model, source, fabric, start.warm)
        resume = False
    title = experiment.method.name
    fit(model, source, experiment.train, out=run.path, resume=resume, teacher=teacher, title=title, **options)
    return result | {"top1": evaluate(model, source, fabric=fabric)}


def _quantize(
    experiment: Experiment, run: RunDir, model: nn.Module, source: Source, fabric: Fabric, warm: Path | None
) -> dict[str, Any]:
    """Prepare and calibrate the float network; all processes do the same, and the first one's result is everyone's."""
    assert experiment.method is not None
    # One memory format, whether the network was trained just now or loaded: sums round differently in another.
    layout = torch.channels_last if experiment.train.channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    result = {"float_top1": evaluate(model, source, fabric=fabric)}
    if fabric.is_global_zero:
        run.write_float(model)
        print(f"float network: {result['float_top1']:.2f}% top-1")
    if warm is not None:
        load_strictly(model, without_quantizers(read_safetensors(warm)), warm)
    prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
    settings = experiment.calibration
    batches = source.calibration_batches(settings.batch_size, settings.batches, seed=experiment.seed)
    calibrate(model, batches, observer=settings.observer, batch_norm=settings.batch_norm)
    share_state(model, fabric)
    result["calibrated_top1"] = evaluate(model, source, fabric=fabric)
    if fabric.is_global_zero:
        print(f"after calibration: {result['calibrated_top1']:.2f}% top-1")
        run.write_result(result)
    return result


def _teacher_of(run: RunDir, experiment: Experiment) -> nn.Module | None:
    if experiment.train.loss.distillation == 0:
        return None
    teacher = build(experiment.model)
    load_strictly(teacher, read_safetensors(run.float_weights), run.float_weights)
    return teacher


def _check_fit(experiment: Experiment, source: Source) -> None:
    """Whether data, model and batch size belong together."""
    classes, channels = len(source.classes), source.channels
    if experiment.model.num_classes != classes:
        raise ConfigError(
            f"model.num_classes is {experiment.model.num_classes} but {source.name} has {classes} classes; "
            f"--set model.num_classes={classes}."
        )
    if experiment.model.in_channels != channels:
        raise ConfigError(
            f"model.in_channels is {experiment.model.in_channels} but {source.name} has {channels} channels; "
            f"--set model.in_channels={channels}."
        )
    if len(NORMALIZATIONS[experiment.data.normalization][0]) not in (1, channels):
        raise ConfigError(
            f"data.normalization {experiment.data.normalization!r} is not for images of {channels} channels; "
            "--set data.normalization=half."
        )
    for name, settings in (("train", experiment.train), ("float_train", experiment.float_train)):
        if settings is None:
            continue
        require_compiler(settings, name)
        if settings.batch_size > source.train_size:
            raise ConfigError(
                f"{name}.batch_size is {settings.batch_size} but {source.name} has {source.train_size} training "
                "images; set a smaller one."
            )
