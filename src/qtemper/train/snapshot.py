"""What is in a checkpoint: a training's state as tensors and JSON, and back, with everything checked before use."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtemper.errors import CheckpointError

_MOMENTS: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
}
"""What each optimizer keeps of a parameter; of any other kind, every name is taken."""


def _elastic() -> bool:
    return os.environ.get("QTEMPER_ELASTIC") == "1"


@dataclass
class TrainState:
    """Everything a training needs to continue.

    Attributes:
        model: what is trained.
        optimizers: in a fixed order.
        step: optimizer steps done.
        config_hash: of the training's configuration; a checkpoint of another one is refused.
        history: metrics of the epochs done.
        totals: sums of the epoch under way: loss, correct predictions, steps.
        lr_factor: what rollbacks have done to the learning rate.
        config: the configuration as plain JSON data, so that a refusal can name the difference; may stay empty.
        world_size: number of processes that train; a checkpoint of another number is refused unless `elastic`.
        elastic: continue, with a message, under another number of processes or version of qtemper: sound, but
            no longer to the bit. By default where the environment has QTEMPER_ELASTIC=1.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    config_hash: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    lr_factor: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    elastic: bool = field(default_factory=_elastic)


# --- out ---------------------------------------------------------------------------------------------------------


def capture(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizers and generators as tensors, and all else as JSON data; the model's state dict is not among them."""
    tensors, groups = {}, []
    for i, optimizer in enumerate(state.optimizers):
        saved = optimizer.state_dict()
        groups.append(saved["param_groups"])
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                if value is not None:
                    tensors[f"{i}.{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the state users' code has)
    document = {
        "step": state.step,
        "config_hash": state.config_hash,
        "config": state.config,
        "world_size": state.world_size,
        "history": state.history,
        "totals": state.totals,
        "lr_factor": state.lr_factor,
        "param_groups": groups,
        "python_random": random.getstate(),
        "numpy_random": [name, np.asarray(keys).tolist(), *rest],
    }
    return tensors, document


def not_finite(state: TrainState, tensors: dict[str, Tensor]) -> str | None:
    """The first parameter or optimizer state with NaN or infinity, or None."""
    for name, tensor in itertools.chain(state.model.named_parameters(), tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


# --- and back ----------------------------------------------------------------------------------------------------


def restore(
    state: TrainState, document: dict[str, Any], weights: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Put a checkpoint's content into `state` and the global generators; nothing changes unless all of it is sound.

    Raises:
        CheckpointError: anything is missing, of another kind or shape, or unexpected; without the checkpoint's path.
    """
    step, history, totals = document["step"], document["history"], document["totals"]
    _require(_is_count(step), "step is no count")
    _require(isinstance(history, list) and all(isinstance(x, dict) for x in history), "history is no list of objects")
    _require(
        isinstance(totals, list) and len(totals) == len(state.totals) and all(map(_is_number, totals)),
        f"totals are not {len(state.totals)} finite numbers",
    )
    factor = document.get("lr_factor", 1.0)
    _require(_is_number(factor), "lr_factor is no finite number")
    own = state.model.state_dict()
    for name, tensor in weights.items():
        _require(tensor.dtype == own[name].dtype, f"{name} is {tensor.dtype}, expected {own[name].dtype}")
    groups = document["param_groups"]
    _require(
        isinstance(groups, list) and len(groups) == len(state.optimizers),
        f"it is not of {len(state.optimizers)} optimizer(s)",
    )
    merged = [_param_groups(optimizer, groups[i]) for i, optimizer in enumerate(state.optimizers)]
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in state.optimizers]
    for name, tensor in tensors.items():
        if not name.startswith("rng."):
            i, index, key = _moment(name, tensor, state.optimizers)
            moments[i].setdefault(index, {})[key] = tensor
    apply_generators = _generators(document, tensors)
    state.model.load_state_dict(weights)
    for i, optimizer in enumerate(state.optimizers):
        optimizer.load_state_dict({"param_groups": merged[i], "state": moments[i]})
        _lay_out_as_parameters(optimizer)
    apply_generators()
    state.step = step
    state.history[:] = history
    state.totals[:] = totals
    state.lr_factor = factor


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their parameters: one that differs takes a GPU's updates off the fast path."""
    for parameter, moments in optimizer.state.items():
        for key, moment in moments.items():
            # A number is the count of steps, which stays on the host.
            if isinstance(moment, Tensor) and moment.dim() and moment.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _param_groups(optimizer: torch.optim.Optimizer, saved: Any) -> list[dict[str, Any]]:
    """Saved parameter groups, with their values in the types that the optimizer has."""
    own: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    _require(isinstance(saved, list) and all(isinstance(group, dict) for group in saved), "param_groups are no objects")
    _require([g.get("params") for g in saved] == [g["params"] for g in own], "param_groups are of other parameters")
    merged = []
    for mine, theirs in zip(own, saved, strict=True):
        unknown = sorted(theirs.keys() - mine.keys())
        _require(not unknown, f"param_groups has unexpected {unknown[:1]!r:.60}")
        merged.append({key: _like(mine[key], theirs.get(key, mine[key]), key) for key in mine})
    return merged


def _like(own: Any, saved: Any, key: str) -> Any:
    if isinstance(own, list | tuple):
        _require(isinstance(saved, list | tuple) and len(saved) == len(own), f"param_groups.{key} is no list")
        return type(own)(_like(x, y, key) for x, y in zip(own, saved, strict=True))
    same = type(own) is type(saved) or (_is_number(own) and _is_number(saved))
    _require(same and (not isinstance(saved, float) or math.isfinite(saved)), f"param_groups.{key} is {saved!r:.40}")
    return saved


def _moment(name: str, tensor: Tensor, optimizers: list[torch.optim.Optimizer]) -> tuple[int, int, str]:
    found = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\w+)", name)
    _require(found is not None and int(found[1]) < len(optimizers), f"unexpected {name!r:.80} in optimizer.safetensors")
    assert found is not None
    i, index, key = int(found[1]), int(found[2]), found[3]
    parameters = [parameter for group in optimizers[i].param_groups for parameter in group["params"]]
    known = _MOMENTS.get(type(optimizers[i]))
    _require(
        index < len(parameters) and (known is None or key in known), f"unexpected {name!r:.80} in optimizer.safetensors"
    )
    shape = parameters[index].shape
    _require(
        tensor.shape == (torch.Size() if key == "step" else shape) or (known is None and tensor.numel() == 1),
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}",
    )
    return i, index, key


def _generators(document: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A function that sets all random generators; each state has been tried on a throwaway first."""
    torch_state = tensors["rng.torch"]
    torch.Generator().set_state(torch_state)
    version, internal, gauss = document["python_random"]
    python = (version, tuple(internal), gauss)
    random.Random().setstate(python)
    name, keys, *rest = document["numpy_random"]
    numpy = (name, np.array(keys, dtype=np.uint32), *rest)
    np.random.RandomState().set_state(numpy)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and "rng.cuda.0" in tensors else range(0)
    cuda = [tensors[f"rng.cuda.{i}"] for i in devices if f"rng.cuda.{i}" in tensors]
    for i, rng in enumerate(cuda):
        torch.Generator(f"cuda:{i}").set_state(rng)

    def apply() -> None:
        torch.set_rng_state(torch_state)
        for i, rng in enumerate(cuda):
            torch.cuda.set_rng_state(rng, i)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002

    return apply


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Where two configurations, as plain data, differ: `path: old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            if key not in new:
                found.append(f"{path}: {old[key]!r:.60}, now absent")
            elif key not in old:
                found.append(f"{path}: absent, now {new[key]!r:.60}")
            else:
                found += differences(old[key], new[key], path)
        return found
    # Through JSON, because a tuple and the list that it was saved as are the same configuration.
    same = json.dumps(old, sort_keys=True, default=repr) == json.dumps(new, sort_keys=True, default=repr)
    return [] if same else [f"{prefix}: {old!r:.60}, now {new!r:.60}"]


def shorten(found: list[str], count: int = 3) -> str:
    """The first few of a list of differences, in one line."""
    more = f"; and {len(found) - count} more" if len(found) > count else ""
    return "; ".join(found[:count]) + more


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(problem)
