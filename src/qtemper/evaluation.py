"""What a run trained: its network from the disk, its test accuracy, the same network at other bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtemper.config import Experiment
from qtemper.data import Source, open_source
from qtemper.errors import CheckpointError, ConfigError
from qtemper.models import build
from qtemper.policy import FLOAT_BITS
from qtemper.prepare import prepare
from qtemper.requantize import requantize
from qtemper.run import RunDir
from qtemper.train import evaluate
from qtemper.train.state import load_model
from qtemper.weights import load_strictly, read_safetensors


def build_model(experiment: Experiment) -> nn.Module:
    """The experiment's network, prepared if it has a method; weights are random."""
    torch.manual_seed(experiment.seed)
    model = build(experiment.model)
    if experiment.method is not None:
        prepare(model, experiment.method, experiment.policy, seed=experiment.seed)
    return model


def load_run(run: RunDir) -> tuple[Experiment, nn.Module]:
    """A run's network: the final one, or that of its newest checkpoint.

    Raises:
        CheckpointError: the run has neither, or it is damaged.
    """
    experiment = run.experiment()
    if experiment.stages and not run.final.exists() and not run.checkpoints.is_dir():
        raise CheckpointError(
            f"{run.path} is still in its stages; continue it with --resume, or name one of {run.path / 'stages'}."
        )
    model = build_model(experiment)
    if run.final.exists():
        load_strictly(model, read_safetensors(run.final), run.final)
    else:
        path, lines = load_model(run.checkpoints, model)
        print(*lines, f"{run.path} has not finished its training: this is its {path.name}.", sep="\n", file=sys.stderr)
    return experiment, model


def evaluate_run(
    run: RunDir, data: Path | None = None, *, bits: Sequence[str] = (), batch_norm: bool = False
) -> dict[str, Any]:
    """Test accuracy of a run's network, in percent, with the recorded accuracies beside it.

    Args:
        run: the run.
        data: the data set's directory; the training's own if not given.
        bits: other bits to evaluate it at as well, `W3` or `W3A8`; see `at_bits`.
        batch_norm: for `at_bits`.

    Returns:
        `run`, `recipe`, what the run's own result says, `top1`, whether it is `finished`, and with `bits` `top1_at`.

    Raises:
        ConfigError: bits that cannot be read, or `batch_norm` without bits.
        CheckpointError: the run has no network, or a damaged one.
    """
    experiment, model = load_run(run)
    if batch_norm and not bits:
        raise ConfigError("--batch-norm re-estimates statistics at other bits: name them with --bits.")
    for text in bits:
        experiment.policy.at(text)  # what cannot be read shows now
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_source(experiment.data, data or run.data_directory(), device)
    model.to(device)
    result = {"run": str(run.path), "recipe": experiment.name, **run.read_result(), "top1": evaluate(model, source)}
    result["finished"] = run.final.exists()
    if bits:
        others = (at_bits(experiment, model, source, text, batch_norm=batch_norm) for text in bits)
        result["top1_at"] = {text: evaluate(other, source) for text, other in zip(bits, others, strict=True)}
    return result


def at_bits(
    experiment: Experiment, trained: nn.Module, source: Source, bits: str, *, batch_norm: bool = False
) -> nn.Module:
    """A run's trained network at other bits, without training: see `requantize`.

    A float network gets the calibrated grid of `ste`, and keeps its activations in float unless `bits` names them.

    Args:
        experiment: the run's.
        trained: its network, which stays as it is.
        source: where calibration batches come from.
        bits: `W3` for the weights, `W3A8` for activations, too; see `BitPolicy.at`.
        batch_norm: re-estimate batch-norm statistics; else they stay as trained.
    """
    policy, settings = experiment.policy, experiment.calibration
    if experiment.method is None:
        policy = replace(policy, weight=FLOAT_BITS, activation=FLOAT_BITS)
    return requantize(
        trained,
        build(experiment.model).to(next(trained.parameters()).device),
        experiment.method or "ste",
        policy.at(bits),
        source.calibration_batches(settings.batch_size, settings.batches, seed=experiment.seed),
        observer=settings.observer,
        batch_norm=batch_norm,
        seed=experiment.seed,
    )
