"""Rows: damaged and hostile checkpoints."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.faults.driver import Child, command, scratch, start
from benchmarks.faults.table import Row, counted, row
from safetensors.torch import load, save

from qtemper.errors import CheckpointError
from qtemper.evaluation import build_model
from qtemper.run import RunDir
from qtemper.train.optim import build_optimizers
from qtemper.train.snapshot import TrainState
from qtemper.train.state import load_checkpoint, load_model

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
MEMORY = 200 * 2**20
"""Bytes that a hostile checkpoint may make a process grow by; the true ones have half a megabyte."""


@functools.cache
def finished() -> Path:
    """A finished run with its two checkpoints, for the life of this process."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    trial = start(command(folder / "run")).wait()
    assert trial.code == 0, trial.err
    return folder / "run"


def fresh_state(run: Path) -> TrainState:
    """What the engine loads a checkpoint into."""
    experiment = RunDir.open(run).experiment()
    model = build_model(experiment)
    document = json.loads((newest(run) / "state.json").read_text())
    return TrainState(
        model,
        build_optimizers(model, experiment.train.optim),
        config_hash=document["config_hash"],
        world_size=document["world_size"],
    )


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def previous_is_used(run: Path, model: torch.nn.Module, previous: dict[str, torch.Tensor]) -> bool:
    """Whether loading says that the newest is damaged and takes the one before."""
    _, messages = load_model(run / "checkpoints", model)
    own = model.state_dict()
    said = len(messages) == 1 and messages[0].startswith(f"{newest(run).name} is damaged")
    return said and all(torch.equal(own[key], value) for key, value in previous.items())


@row
def damaged_checkpoint() -> Row:
    """The newest checkpoint of a real run, damaged in one place at a time."""
    draw, failures = random.Random(0), []
    counts = {"truncations": 50, "bit flips": 400, "zeroed pages": 20}
    with scratch() as folder:
        run = folder / "run"
        shutil.copytree(finished(), run)
        state = fresh_state(run)
        before = min((run / "checkpoints").iterdir())
        previous = load((before / "model.safetensors").read_bytes())
        contents = {name: (newest(run) / name).read_bytes() for name in FILES}
        sizes = [len(content) for content in contents.values()]
        for kind, count in counts.items():
            for i in range(count):
                # Every file in turn for truncations, and by its size, as bits rot, for the rest but a quarter.
                name = FILES[i % 4] if kind == "truncations" or i % 4 == 3 else draw.choices(FILES, sizes)[0]
                content = contents[name]
                (newest(run) / name).write_bytes(damage(kind, content, draw))
                try:
                    found = previous_is_used(run, state.model, previous)
                except Exception as error:
                    found = False
                    failures.append(f"{kind} {i} of {name}: {type(error).__name__}: {error}")
                else:
                    failures += [] if found else [f"{kind} {i} of {name} went unnoticed"]
                (newest(run) / name).write_bytes(content)
    return counted(
        "truncation at 50 offsets; 400 single-bit flips; 20 zeroed pages",
        "detected, previous checkpoint used, said so",
        "detected",
        failures,
        sum(counts.values()),
    )


def damage(kind: str, content: bytes, draw: random.Random) -> bytes:
    """Content with one fault."""
    if kind == "truncations":
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    if kind == "bit flips":
        position = draw.randrange(8 * len(content))
        changed[position // 8] ^= 1 << position % 8
        return bytes(changed)
    page = draw.randrange((len(content) + 4095) // 4096) * 4096
    end = min(page + 4096, len(content))
    changed[page:end] = bytes(end - page)
    return bytes(changed)


# --- hostile -----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def framed(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def tensors_changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    def act(content: bytes) -> bytes:
        tensors = load(content)
        change(tensors)
        return save(tensors)

    return act


def document_changed(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def without(key: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != key}).encode()


MODEL, OPTIMIZER, STATE = FILES[:3]
RESEALED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a huge header, 2^63": (MODEL, lambda _: framed(b"{}", 2**63)),
    "a huge header, 99 MB": (MODEL, lambda _: framed(b"{}", 99_000_000)),
    "a terabyte tensor": (
        MODEL,
        lambda _: framed(json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()),
    ),
    "nested brackets": (MODEL, lambda _: framed(b"[" * 1_000_000)),
    "an empty model": (MODEL, lambda _: save({})),
    "a wrong shape": (MODEL, tensors_changed(lambda t: t.update({"fc.weight": torch.zeros(3, 3)}))),
    "a wrong dtype": (MODEL, tensors_changed(lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int64)}))),
    "a missing key": (MODEL, tensors_changed(lambda t: t.pop("fc.weight"))),
    "an extra key": (MODEL, tensors_changed(lambda t: t.update({"../../x": torch.zeros(1)}))),
    "an extra moment": (OPTIMIZER, tensors_changed(lambda t: t.update({"0.0.__class__": torch.zeros(1)}))),
    "a moment of no parameter": (
        OPTIMIZER,
        tensors_changed(lambda t: t.update({"0.999.momentum_buffer": torch.zeros(2)})),
    ),
    "a moment of no optimizer": (
        OPTIMIZER,
        tensors_changed(lambda t: t.update({"7.0.momentum_buffer": torch.zeros(2)})),
    ),
    "a moment's shape": (OPTIMIZER, tensors_changed(lambda t: t.update({"0.0.momentum_buffer": torch.zeros(2)}))),
    "a name without end": (OPTIMIZER, tensors_changed(lambda t: t.update({"9" * 10_000: torch.zeros(1)}))),
    "no generator": (OPTIMIZER, tensors_changed(lambda t: t.pop("rng.torch"))),
    "a generator's size": (
        OPTIMIZER,
        tensors_changed(lambda t: t.update({"rng.torch": torch.zeros(9, dtype=torch.uint8)})),
    ),
    "state of a million brackets": (STATE, lambda _: b"[" * 1_000_000),
    "state that is a list": (STATE, lambda _: b"[]"),
    "state that is no text": (STATE, lambda _: b"\xff\xfe\x00"),
    "a number of a million digits": (
        STATE,
        lambda c: c.replace(b'"totals"', b'"x": ' + b"1" * 1_000_000 + b', "totals"'),
    ),
    "no groups": (STATE, without("param_groups")),
    "no step": (STATE, without("step")),
    "a step of text": (STATE, document_changed(step="__import__('os')")),
    "a negative step": (STATE, document_changed(step=-1)),
    "history of text": (STATE, document_changed(history="x")),
    "totals of NaN": (STATE, document_changed(totals=[float("nan")] * 3)),
    "groups of something else": (STATE, document_changed(param_groups=[[{"params": [0], "x": 1}]])),
    "a generator of text": (STATE, document_changed(python_random=[3, "x" * 625, None])),
    "NumPy's generator of objects": (STATE, document_changed(numpy_random=[{"a": 1}, [0], 0])),
    "a format from the future": (STATE, document_changed(format=99)),
    "a world of text": (STATE, document_changed(world_size={"a": "b"})),
}
"""Attacks by someone who writes a manifest that verifies."""


def reseal(checkpoint: Path) -> None:
    """A manifest for whatever the files hold now."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest.pop("sha256")
    for name in FILES[:3]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(checkpoint, manifest)


def seal(checkpoint: Path, manifest: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()
    text = json.dumps(manifest | {"sha256": digest}, indent=1, sort_keys=True)
    (checkpoint / "manifest.json").write_text(text)


def traversing(checkpoint: Path, mark: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"][f"../../../{mark.name}"] = manifest["files"]["state.json"]
    seal(checkpoint, manifest)


def sparse(checkpoint: Path, _mark: Path) -> None:
    os.truncate(checkpoint / MODEL, 2**40)


def pipe(checkpoint: Path, _mark: Path) -> None:
    (checkpoint / MODEL).unlink()
    os.mkfifo(checkpoint / MODEL)


def device(checkpoint: Path, _mark: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).symlink_to("/dev/zero")


def pickled(name: str, protocol: int, torch_zip: bool = False) -> Callable[[Path, Path], None]:
    def act(checkpoint: Path, mark: Path) -> None:
        if torch_zip:
            torch.save({"a": Bomb(mark)}, checkpoint / name)
        else:
            (checkpoint / name).write_bytes(pickle.dumps(Bomb(mark), protocol))
        reseal(checkpoint)

    return act


def replaced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def act(checkpoint: Path, _mark: Path) -> None:
        (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))
        reseal(checkpoint)

    return act


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    **{f"a pickle as {name}, protocol {p}": pickled(name, p) for name in FILES[:3] for p in (0, 2, 5)},
    **{f"torch.save as {name}": pickled(name, 2, torch_zip=True) for name in FILES[:2]},
    "path traversal in the manifest": traversing,
    "a sparse terabyte": sparse,
    "a pipe": pipe,
    "a link to /dev/zero": device,
    **{what: replaced(name, change) for what, (name, change) in RESEALED.items()},
}


def attack(name: str) -> str | None:
    """Load one hostile checkpoint, alone in its directory, in a child; what is wrong, or None."""
    with scratch() as folder:
        run, mark = folder / "run", folder / "executed"
        shutil.copytree(finished(), run)
        state = fresh_state(run)
        shutil.rmtree(min((run / "checkpoints").iterdir()))
        ATTACKS[name](newest(run), mark)

        def act() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            message = None
            try:
                load_checkpoint(run / "checkpoints", state)
            except CheckpointError as error:
                message = str(error)
            assert message is not None, "accepted"
            assert "\n" not in message, "more than one line"
            assert len(message) < 1000, "a message without end"
            assert state.step == 0, "the state has changed"
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            assert grown < MEMORY, f"{grown} bytes of memory"

        trial = Child(act).wait(30)
        if mark.exists():
            return f"{name}: EXECUTED"
    return None if trial.code == 0 else f"{name}: {trial.code} {trial.err.strip()[-300:]}"


@row
def hostile_checkpoint() -> Row:
    """Pickles, huge headers, traversal, wrong shapes, extra keys, pipes, devices; with manifests that verify."""
    failures = [wrong for name in ATTACKS if (wrong := attack(name))]
    executed = sum("EXECUTED" in wrong for wrong in failures)
    return Row(
        "hostile checkpoint (pickle, huge header, path traversal, wrong shapes, extra keys)",
        "nothing executed, bounded memory, one error",
        f"{executed} executed / {len(ATTACKS)}; {len(ATTACKS) - len(failures)} / {len(ATTACKS)} one error",
        not failures,
        failures,
    )
