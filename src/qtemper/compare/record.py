"""What a run left: its state, and one JSON line that outlives the machine."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qtemper.compare.grid import Run
from qtemper.errors import ConfigError
from qtemper.files import digest, write_atomically

State = Literal["waiting", "started", "done", "diverged", "failed", "pruned"]


Key = tuple[str, str, str | None, str]
"""Configuration, arm, float network and processor (other last bits, another run): what tells two lines apart."""


def outcome_path(run: Run, root: Path) -> Path:
    """The file in which the scheduler says how a run's process ended and how long it took."""
    return root / "logs" / f"{run.directory(root).name}.json"


@dataclass(frozen=True)
class Record:
    """A run's state and results.

    Attributes:
        run: which run.
        state: `waiting` (nothing there), `started`, `done`, `diverged` (NaN: it counts as a result), `failed`, or
            `pruned` (a sweep gave it up).
        epochs: the epoch lines of its metrics.
        result: its `result.json`.
        environment: its `environment.json`.
        outcome: what the scheduler noted.
        stage_epochs: how many epochs its stages have behind them.
    """

    run: Run
    state: State
    epochs: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    stage_epochs: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.state not in ("waiting", "started")

    @property
    def key(self) -> Key:
        """What tells its line apart."""
        return _key(self.line())

    @property
    def progress(self) -> float:
        """Finished part of the training, 0 to 1."""
        done = self.stage_epochs + len(self.epochs)
        return 1.0 if self.state in ("done", "diverged") else done / self.run.experiment.total_epochs

    def line(self) -> dict[str, Any]:
        """The run as plain data for a line of JSON."""
        last = self.epochs[-1] if self.epochs else {}
        keys = ("torch", "cpu_flags", "threads", "gpu", "commit", "init_sha256")
        return {
            "config_hash": self.run.config_hash,
            "recipe": self.run.recipe,
            "arm": self.run.arm.label,
            "assignments": list(self.run.arm.assignments),
            "seed": self.run.seed,
            "state": self.state,
            **self.result,
            "train_loss": last.get("train_loss"),
            "train_top1": last.get("train_top1"),
            "test_top1_by_epoch": {
                str(e["epoch"]): e["test_top1"] for e in self.epochs if e.get("test_top1") is not None
            },
            "wall_seconds": self.outcome.get("seconds"),
            "message": self.outcome.get("message"),
            **{key: self.environment.get(key) for key in keys},
        }


def read(run: Run, root: Path) -> Record:
    """The record of a run, as far as it got."""
    directory = run.directory(root)
    outcome = _json(outcome_path(run, root))
    gave_up = outcome.get("state") in ("diverged", "failed", "pruned")
    if not (directory / "config.json").is_file() and not gave_up:
        return Record(run, "waiting")
    result = _json(directory / "result.json")
    state: State = "started"
    if (directory / "final.safetensors").is_file() and "top1" in result:
        state = "done"
    elif gave_up:
        state = outcome["state"]
    return Record(
        run,
        state,
        _epochs(directory / "metrics.jsonl"),
        result,
        _json(directory / "environment.json"),
        outcome,
        sum(len(_epochs(path)) for path in directory.glob("stages/*/metrics.jsonl")),
    )


def note(run: Run, root: Path, *, state: State, seconds: float, message: str = "") -> None:
    """Write down how a run's process ended; the time adds to that of earlier processes."""
    path = outcome_path(run, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds += float(_json(path).get("seconds", 0.0))
    data = {"state": state, "seconds": round(seconds, 1), "message": message, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
    write_atomically(path, (json.dumps(data) + "\n").encode())


def require_same_start(runs: list[Run], root: Path, init: Path | None) -> None:
    """Refuse to go on with runs that began from another float network.

    Raises:
        ConfigError: naming the first of them.
    """
    wanted = None if init is None or not init.is_file() else digest(init)
    for run in runs:
        directory = run.directory(root)
        there = _json(directory / "environment.json").get("init_sha256", wanted)  # older runs do not say
        if there != wanted:
            raise ConfigError(
                f"{directory} was started from another float network than --init {init}; give that one, or choose "
                "another --out."
            )


def read_keys(path: Path) -> set[Key]:
    """The runs that a file of JSON lines holds; a last line that was cut off does not count.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; give --record a file of JSON lines.") from None
    known, lines = set(), text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            data = dict(json.loads(line))
            known.add(_key(data))
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not text.endswith("\n"):
                continue
            raise ConfigError(f"line {number} of {path} is no run; give --record another file, or mend it.") from None
    return known


def _key(line: dict[str, Any]) -> Key:
    flags = ",".join(line.get("cpu_flags") or [])
    return str(line["config_hash"]), str(line["arm"]), line.get("init_sha256"), line.get("gpu") or flags


def append_lines(records: list[Record], path: Path) -> tuple[int, int]:
    """Add the ended runs to a file of JSON lines, each once.

    Returns:
        How many were added, and how many were there already.

    Raises:
        ConfigError: the file cannot be read or written, or holds something else.
    """
    known = read_keys(path)
    ended = [record for record in records if record.state in ("done", "diverged")]
    # Lines of the time before they told the float network count as of any.
    fresh = [r.line() for r in ended if not {r.key, (*r.key[:2], None, r.key[3])} & known]
    if fresh:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.read_bytes() if path.exists() else b""
            tail = there[there.rfind(b"\n") + 1 :]
            if tail and not _is_json(tail):  # cut off by a crash
                os.truncate(path, len(there) - len(tail))
                tail = b""
            # One write at the end, so that two commands may record into one file.
            with path.open("a") as file:
                file.write(("\n" if tail else "") + "".join(json.dumps(line) + "\n" for line in fresh))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}.") from None
    return len(fresh), len(ended) - len(fresh)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _epochs(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            data = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the process died
        if isinstance(data, dict) and "epoch" in data:
            found.append(data)
    return found
