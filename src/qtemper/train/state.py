"""Checkpoints: safetensors and JSON, never pickle; complete or not there at all.

A checkpoint is a directory `step-<n>` with `model.safetensors`, `optimizer.safetensors`, `state.json` and, written
last, `manifest.json` with the size and sha256 of each. It is written under a temporary name, flushed to disk, then
renamed; loading takes the newest whose manifest verifies. At no moment are there fewer sound checkpoints than before:

- the first one appears together with its directory, in one rename, so `checkpoints/` never exists without one;
- one of a step that is there already first sets the old one aside as `step-<n>.replaced-<k>`, which also loads;
- older ones go only when `KEEP` newer ones verify, and by a rename, so that none is ever seen half-deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtemper.environment import version
from qtemper.errors import CheckpointError
from qtemper.files import digest, sync_directory, write_synced
from qtemper.train.snapshot import TrainState, capture, differences, not_finite, restore, shorten
from qtemper.weights import check_fit, load_strictly, one_line, read_safetensors, to_bytes

KEEP = 2
"""Number of sound checkpoints that stay on disk."""

FORMAT = 2
"""Format 1 is read, too: its manifest was the list of files alone."""

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

_SLACK = 64 * 2**20
"""Bytes that a checkpoint's file may have beyond eight times the model's: more is not read."""

_NAME = re.compile(r"step-(\d{1,18})(?:\.replaced-(\d{1,9}))?")


# --- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(directory: Path, state: TrainState) -> Path:
    """Write `directory/step-<n>`; older ones beyond `KEEP` go.

    Raises:
        CheckpointError: the disk is full, read-only or the like, or a parameter is NaN or infinite; earlier
            checkpoints stay untouched.
    """
    tensors, document = capture(state)
    broken = not_finite(state, tensors)
    if broken is not None:
        raise CheckpointError(
            f"{broken} is NaN or infinite at step {state.step}, so no checkpoint of it is written; earlier ones are "
            "intact. Lower optim.lr or optim.quantizer_lr, or set optim.clip_norm."
        )
    versions = {"format": FORMAT, "qtemper": version(), "torch": str(torch.__version__)}
    name = f"step-{state.step:08d}"
    try:
        files = {
            "model.safetensors": to_bytes(dict(state.model.state_dict())),
            "optimizer.safetensors": to_bytes(tensors),
            "state.json": json.dumps(versions | document).encode(),
        }
        about = versions | {key: document[key] for key in ("step", "config_hash", "world_size")}
        _publish(directory, name, files, about)
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: {error.strerror or error}; earlier checkpoints are intact. "
            "Make room or choose another --out, then continue with --resume."
        ) from error
    _prune(directory, name)
    return directory / name


def _publish(directory: Path, name: str, files: dict[str, bytes], about: dict[str, Any]) -> None:
    """Write the files under a temporary name and rename them into place, every step of it flushed to the disk."""
    first = not directory.is_dir()
    home = directory.with_name(f".tmp-{directory.name}") if first else directory
    temporary = home / f".tmp-{name}"
    if first:
        shutil.rmtree(home, ignore_errors=True)
    else:
        _clean(directory)
    try:
        temporary.mkdir(parents=True)
        for file, data in files.items():
            write_synced(temporary / file, data)
        entries = {file: {"size": len(data), "sha256": _sha256(data)} for file, data in files.items()}
        write_synced(temporary / "manifest.json", _seal(about | {"files": entries}))
        sync_directory(temporary)
        if (home / name).exists():
            aside = (home / f"{name}.replaced-{k}" for k in range(1, 10**9))
            (home / name).rename(next(path for path in aside if not path.exists()))
        temporary.rename(home / name)
        sync_directory(home)
        if first:
            home.rename(directory)
            sync_directory(directory.parent)
    except OSError:
        shutil.rmtree(home if first else temporary, ignore_errors=True)
        raise


def _prune(directory: Path, written: str) -> None:
    """Remove what is older than the newest `KEEP` sound checkpoints, and what `written` replaced."""
    sound = 0
    for path in _complete(directory):
        if sound >= KEEP or path.name.startswith(f"{written}.replaced-"):
            with contextlib.suppress(OSError):
                path.rename(directory / f".tmp-old-{path.name}")
        elif path.name == written or _damage(path) is None:
            sound += 1
    _clean(directory)


def _clean(directory: Path) -> None:
    """Remove what a crash left half-written, or half-deleted."""
    for path in directory.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _seal(about: dict[str, Any]) -> bytes:
    """A manifest's bytes; its own sha256 among them, so that damage to the manifest is noticed as well."""
    seal = _sha256(json.dumps(about, indent=1, sort_keys=True).encode())
    return json.dumps(about | {"sha256": seal}, indent=1, sort_keys=True).encode()


# --- reading -----------------------------------------------------------------------------------------------------


def load_checkpoint(directory: Path, state: TrainState) -> list[str]:
    """Restore the newest sound checkpoint under `directory` into `state`.

    Returns:
        One line for each damaged checkpoint that was passed over, and for each difference that `state.elastic` allowed.

    Raises:
        CheckpointError: none is sound, or it belongs to another configuration, model, number of processes or version
            of qtemper; `state` is unchanged.
    """
    path, messages = _newest_sound(directory, state.model)
    try:
        document = json.loads((path / "state.json").read_bytes())
        messages += _check_origin(path, document, state)
        weights = read_safetensors(path / "model.safetensors")
        check_fit(state.model, weights, path / "model.safetensors")
        tensors = read_safetensors(path / "optimizer.safetensors")
    except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise _malformed(path, error) from None
    try:
        restore(state, document, weights, tensors)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, RecursionError, IndexError) as error:
        raise _malformed(path, error) from None
    return messages


def load_model(directory: Path, model: nn.Module) -> tuple[Path, list[str]]:
    """Load the model alone from the newest sound checkpoint under `directory`; otherwise as `load_checkpoint`.

    Returns:
        The checkpoint, and lines about damaged ones that were skipped.
    """
    path, skipped = _newest_sound(directory, model)
    load_strictly(model, read_safetensors(path / "model.safetensors"), path / "model.safetensors")
    return path, skipped


def _malformed(path: Path, error: BaseException) -> CheckpointError:
    if isinstance(error, CheckpointError) and str(path) in str(error):
        return error
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return CheckpointError(
        f"{path} verifies but does not hold this training's state ({one_line(text)}); start again with a new --out."
    )


def _check_origin(path: Path, document: dict[str, Any], state: TrainState) -> list[str]:
    """Refuse a checkpoint of other settings; returns lines about what `elastic` lets pass."""
    if document["format"] not in (1, FORMAT):
        raise CheckpointError(f"{path} has format {document['format']!r:.40}, this version reads 1 to {FORMAT}.")
    if document["config_hash"] != state.config_hash:
        config = document.get("config")
        found = differences(config, state.config) if config and state.config else []
        raise CheckpointError(
            f"{path} was written under another configuration{f' ({shorten(found)})' if found else ''}; resume with "
            "the run's own config.json, or start a new run directory."
        )
    changed = []
    size, writer = document.get("world_size", 1), document.get("qtemper", version())
    if size != state.world_size:
        remedy = f"start {size!r:.40} (torchrun --nproc-per-node)"
        changed.append((f"by {size!r:.40} process(es), and {state.world_size} would continue", remedy))
    if writer != version():
        changed.append((f"by qtemper {writer!r:.40}, and this is {version()}", "install that version"))
    if changed and not state.elastic:
        what, how = (", ".join(words) for words in zip(*changed, strict=True))
        raise CheckpointError(
            f"{path} was written {what}; {how}, or set QTEMPER_ELASTIC=1 to go on with results that are no longer the "
            "uninterrupted run's to the bit."
        )
    return [f"{path.name} was written {what}; going on, as QTEMPER_ELASTIC asks." for what, _ in changed]


def _newest_sound(directory: Path, model: nn.Module) -> tuple[Path, list[str]]:
    limit = _SLACK + 8 * sum(t.numel() * t.element_size() for t in model.state_dict().values())
    damaged: list[str] = []
    for path in _complete(directory):
        damage = _damage(path, limit)
        if not damage:
            return path, [f"{line}; using the one before." for line in damaged]
        damaged.append(f"{path.name} is damaged ({one_line(damage)})")
    detail = f" ({'; '.join(damaged)})" if damaged else ""
    raise CheckpointError(f"no sound checkpoint in {directory}{detail}; start again with a new --out.")


def holds_checkpoints(directory: Path) -> bool:
    """Whether there is a checkpoint, sound or not."""
    return bool(_complete(directory))


def _complete(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first; temporary ones do not count, and replaced ones come after their step's."""
    found = []
    for path in directory.glob("step-*") if directory.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name is not None:
            found.append(((int(name[1]), name[2] is None, int(name[2] or 0)), path))
    return [path for _, path in sorted(found, reverse=True)]


def _damage(path: Path, limit: int | None = None) -> str | None:
    """What is wrong with a checkpoint, or None; a file of more than `limit` bytes is not read."""
    try:
        entries = _read_manifest(path / "manifest.json")
        for name in FILES:
            file = path / name
            if not file.is_file():  # nor a pipe, which would never end
                return f"{name} is missing"
            size = file.stat().st_size
            if limit is not None and size > limit:
                return f"{name} has {size} bytes, more than this model's could"
            if size != entries[name]["size"] or digest(file) != entries[name]["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's entry for each file. Its names are never made into paths; others than ours are refused."""
    if not path.is_file():
        raise ValueError("manifest.json is missing")
    with path.open("rb") as file:
        raw = file.read(2**20)
    manifest = json.loads(raw)
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json is no object")
    entries: Any = manifest
    if "files" in manifest:
        if raw != _seal({key: value for key, value in manifest.items() if key != "sha256"}):
            raise ValueError("manifest.json does not match its checksum")
        entries = manifest["files"]
    if not isinstance(entries, dict) or set(entries) != set(FILES):
        raise ValueError("manifest.json does not list the three files of a checkpoint")
    return entries


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
