"""Checkpoints: safetensors and JSON, never pickle; complete or not there at all.

A checkpoint is a directory `step-<n>` with `model.safetensors`, `optimizer.safetensors`, `state.json` and, written
last, `manifest.json` with the size and sha256 of each. It is written under a temporary name, flushed to disk, then
renamed; loading takes the newest whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtemper.errors import CheckpointError

KEEP = 2
"""Number of checkpoints that stay on disk."""

FORMAT = 1


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
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    config_hash: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    lr_factor: float = 1.0


def save_checkpoint(directory: Path, state: TrainState) -> Path:
    """Write `directory/step-<n>`; older ones beyond `KEEP` go.

    Raises:
        CheckpointError: the disk is full, read-only or the like; earlier checkpoints stay untouched.
    """
    final = directory / f"step-{state.step:08d}"
    temporary = directory / f".tmp-{state.step:08d}"
    tensors, groups = _optimizer_tensors(state.optimizers)
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    document = {
        "format": FORMAT,
        "step": state.step,
        "config_hash": state.config_hash,
        "history": state.history,
        "totals": state.totals,
        "lr_factor": state.lr_factor,
        "param_groups": groups,
        "python_random": random.getstate(),
        "numpy_random": _numpy_state(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {
            "model.safetensors": _to_bytes(dict(state.model.state_dict())),
            "optimizer.safetensors": _to_bytes(tensors),
            "state.json": json.dumps(document).encode(),
        }
        for name, data in files.items():
            write_synced(temporary / name, data)
        manifest = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: {error.strerror or error}; earlier checkpoints are intact. "
            "Make room or choose another --out, then continue with --resume."
        ) from error
    for old in _complete(directory)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(directory: Path, state: TrainState) -> list[str]:
    """Restore the newest sound checkpoint under `directory` into `state`.

    Returns:
        One line for each damaged checkpoint that was passed over.

    Raises:
        CheckpointError: none is sound, or it belongs to another configuration or model.
    """
    path, skipped = _newest_sound(directory)
    _restore(path, state)
    return skipped


def load_model(directory: Path, model: nn.Module) -> list[str]:
    """Load the model alone from the newest sound checkpoint under `directory`; otherwise as `load_checkpoint`."""
    path, skipped = _newest_sound(directory)
    load_strictly(model, read_safetensors(path / "model.safetensors"), path / "model.safetensors")
    return skipped


def _newest_sound(directory: Path) -> tuple[Path, list[str]]:
    damaged: list[str] = []
    for path in _complete(directory):
        damage = _damage(path)
        if not damage:
            return path, [f"{line}; using the one before." for line in damaged]
        damaged.append(f"{path.name} is damaged ({damage})")
    detail = f" ({'; '.join(damaged)})" if damaged else ""
    raise CheckpointError(f"no sound checkpoint in {directory}{detail}; start again with a new --out.")


def _restore(path: Path, state: TrainState) -> None:
    document = json.loads((path / "state.json").read_bytes())
    if document["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {document['format']}, this version reads {FORMAT}.")
    if document["config_hash"] != state.config_hash:
        raise CheckpointError(
            f"{path} was written under another configuration; resume with the run's own config.json, "
            "or start a new run directory."
        )
    load_strictly(state.model, read_safetensors(path / "model.safetensors"), path / "model.safetensors")
    tensors = read_safetensors(path / "optimizer.safetensors")
    for i, (optimizer, groups) in enumerate(zip(state.optimizers, document["param_groups"], strict=True)):
        optimizer.load_state_dict({"state": _unflatten(tensors, f"{i}."), "param_groups": groups})
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda.0" in tensors:
        torch.cuda.set_rng_state_all([tensors[f"rng.cuda.{i}"] for i in range(torch.cuda.device_count())])
    version, internal, gauss = document["python_random"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = document["numpy_random"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 (the state users' code has)
    state.step = document["step"]
    state.history[:] = document["history"]
    state.totals[:] = document["totals"]
    state.lr_factor = document["lr_factor"]


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the state users' code has)
    return [name, np.asarray(keys).tolist(), *rest]


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    tensors, groups = {}, []
    for i, optimizer in enumerate(optimizers):
        document = optimizer.state_dict()
        groups.append(document["param_groups"])
        for index, entries in document["state"].items():
            for key, value in entries.items():
                if value is not None:
                    tensors[f"{i}.{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors, groups


def _unflatten(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name[len(prefix) :].split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    return state


def _complete(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first; temporary ones do not count."""
    return sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            data = (path / name).read_bytes()
            if len(data) != manifest[name]["size"] or _sha256(data) != manifest[name]["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# --- files ---------------------------------------------------------------------------------------------------


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}.") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically."""
    write_atomically(path, _to_bytes(tensors, metadata))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give a .safetensors file.")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file.")
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, OSError, RuntimeError, KeyError) as error:
        hint = "pickled .pt/.pth files are never opened; convert with safetensors.torch.save_file(state_dict, path)"
        raise CheckpointError(f"{path} is no sound safetensors file ({error}); {hint}.") from None


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load a state dict; every key and shape must match.

    Raises:
        CheckpointError: with the first differences; the model is unchanged.
    """
    own = model.state_dict()
    quantized = any("_quantizer." in key for key in tensors)
    expected = own if quantized else {k: v for k, v in own.items() if "_quantizer." not in k}
    # Older checkpoints lack batch norm's step counter, which torch itself does not insist on.
    problems = [f"missing {k}" for k in expected if k not in tensors and not k.endswith("num_batches_tracked")]
    problems += [f"unexpected {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(problems[:3])}{more}. Choose the recipe (or --set model.*) "
            "of the network it was trained with."
        )
    model.load_state_dict(tensors)


def _to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened; the rename itself is what there is
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
