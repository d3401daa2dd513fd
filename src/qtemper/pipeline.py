"""A run from start to end: build -> load float -> prepare -> calibrate -> fit -> final.safetensors; and evaluate."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtemper.calibrate import calibrate
from qtemper.config import Experiment
from qtemper.data import NORMALIZATIONS, ImageData, load, test_batches
from qtemper.data.images import Split, epoch_order
from qtemper.errors import CheckpointError, ConfigError
from qtemper.models import build
from qtemper.prepare import prepare
from qtemper.quantizer import quantizers
from qtemper.run import RunDir
from qtemper.train import evaluate, fit
from qtemper.train.state import load_model, load_strictly, read_safetensors


def build_model(experiment: Experiment) -> nn.Module:
    """The experiment's network, prepared if it has a method; weights are random."""
    torch.manual_seed(experiment.seed)
    model = build(experiment.model)
    if experiment.method is not None:
        prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
    return model


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
        Accuracies in percent: `float_top1`, `calibrated_top1`, `top1`.

    Raises:
        ValueError: any bad input; the message names the remedy.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    continues = resume and run.checkpoints.is_dir()
    if resume and not continues and init is None and run.float_weights.exists():
        init = run.float_weights  # stopped between the float network and the first checkpoint
    if not continues and experiment.method is not None and init is None and experiment.float_train is None:
        raise ConfigError(
            f"{experiment.name} starts from a float network: give one with --init FLOAT.safetensors "
            f"(a float recipe's final.safetensors, for instance)."
        )
    torch.manual_seed(experiment.seed)
    model = build(experiment.model)
    if init is not None:
        load_strictly(model, read_safetensors(init), init)
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} in {init} has NaN or infinite values; give sound weights.")
    if experiment.method is not None:
        trial = prepare(copy.deepcopy(model), experiment.method, experiment.policy)  # what is wrong shows now
        if not any(True for _ in quantizers(trial)):
            raise ConfigError(
                "the policy leaves every layer in float; set policy.weight or policy.activation to 1 to 8."
            )
    images = load(experiment.data, data)
    _check_fit(experiment, images)
    if not resume:
        run.create(experiment, data)
    print(f"run directory: {run.path}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = _train(experiment, run, model.to(device), images.to(device), init is not None, resume)
    run.write_final(model, experiment)
    run.write_result(result)
    return result


def _train(
    experiment: Experiment, run: RunDir, model: nn.Module, images: ImageData, initialised: bool, resume: bool
) -> dict[str, Any]:
    result = run.read_result()
    fit_options: dict[str, Any] = {"data_config": experiment.data, "seed": experiment.seed}
    if experiment.method is None:
        fit(model, images, experiment.train, out=run.path, resume=resume, title="float", **fit_options)
        return {"top1": evaluate(model, images.test, experiment.data)}
    if resume and run.checkpoints.is_dir():
        teacher = _teacher_of(run, experiment)
        prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
    else:
        if experiment.float_train is not None and not initialised:
            fit(model, images, experiment.float_train, title="float", **fit_options)
        run.write_float(model)
        result = {"float_top1": evaluate(model, images.test, experiment.data)}
        print(f"float network: {result['float_top1']:.2f}% top-1")
        teacher = copy.deepcopy(model) if experiment.train.loss.distillation > 0 else None
        prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
        settings = experiment.calibration
        calibrate(
            model,
            calibration_batches(experiment, images.train),
            observer=settings.observer,
            batch_norm=settings.batch_norm,
        )
        result["calibrated_top1"] = evaluate(model, images.test, experiment.data)
        print(f"after calibration: {result['calibrated_top1']:.2f}% top-1")
        run.write_result(result)
        resume = False
    title = experiment.method.name
    fit(
        model,
        images,
        experiment.train,
        out=run.path,
        resume=resume,
        teacher=teacher,
        title=title,
        **fit_options,
    )
    result["top1"] = evaluate(model, images.test, experiment.data)
    return result


def _teacher_of(run: RunDir, experiment: Experiment) -> nn.Module | None:
    if experiment.train.loss.distillation == 0:
        return None
    teacher = build(experiment.model)
    load_strictly(teacher, read_safetensors(run.float_weights), run.float_weights)
    return teacher


def calibration_batches(experiment: Experiment, split: Split) -> list[torch.Tensor]:
    """Unaugmented training images, normalised, drawn by the experiment's seed."""
    settings = experiment.calibration
    order = epoch_order(len(split), seed=experiment.seed, epoch=0)[: settings.batches * settings.batch_size]
    mean, std = NORMALIZATIONS[experiment.data.normalization]
    order = order.to(split.images.device)
    chosen = Split(split.images[order], split.labels[order])
    return [images for images, _ in test_batches(chosen, settings.batch_size, mean, std)]


def load_run(run: RunDir) -> tuple[Experiment, nn.Module]:
    """A run's network: the final one, or that of its newest checkpoint.

    Raises:
        CheckpointError: the run has neither, or it is damaged.
    """
    experiment = run.experiment()
    model = build_model(experiment)
    if run.final.exists():
        load_strictly(model, read_safetensors(run.final), run.final)
    else:
        for line in load_model(run.checkpoints, model):
            print(line, file=sys.stderr)
    return experiment, model


def evaluate_run(run: RunDir, data: Path | None = None) -> dict[str, Any]:
    """Test accuracy of a run's network, in percent, with the recorded accuracies beside it."""
    experiment, model = load_run(run)
    images = load(experiment.data, data or run.data_directory())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    top1 = evaluate(model, images.test, experiment.data)
    return {"run": str(run.path), "recipe": experiment.name, **run.read_result(), "top1": top1}


def _check_fit(experiment: Experiment, images: ImageData) -> None:
    """Whether data, model and batch size belong together."""
    classes, channels = len(images.classes), images.train.images.shape[1]
    if experiment.model.num_classes != classes:
        raise ConfigError(
            f"model.num_classes is {experiment.model.num_classes} but {images.name} has {classes} classes; "
            f"--set model.num_classes={classes}."
        )
    if experiment.model.in_channels != channels:
        raise ConfigError(
            f"model.in_channels is {experiment.model.in_channels} but {images.name} has {channels} channels; "
            f"--set model.in_channels={channels}."
        )
    if len(NORMALIZATIONS[experiment.data.normalization][0]) not in (1, channels):
        raise ConfigError(
            f"data.normalization {experiment.data.normalization!r} is not for images of {channels} channels; "
            "--set data.normalization=half."
        )
    for name, settings in (("train", experiment.train), ("float_train", experiment.float_train)):
        if settings is not None and settings.batch_size > len(images.train):
            raise ConfigError(
                f"{name}.batch_size is {settings.batch_size} but {images.name} has {len(images.train)} training "
                "images; set a smaller one."
            )
