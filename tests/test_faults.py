"""Faults that take seconds: kills within a save, the lock, refusals, and any content in checkpoints and configs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.faults.events import FileEvents
from benchmarks.faults.rows_damage import seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qtemper.config import Experiment, from_dict, from_json, override, to_dict
from qtemper.errors import CheckpointError, ConfigError
from qtemper.recipes import get_recipe
from qtemper.run import RunDir
from qtemper.train.snapshot import TrainState
from qtemper.train.state import load_checkpoint, load_model, save_checkpoint
from qtemper.weights import save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = "digits-w2a2-tempering"
BOUNDED = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fresh(step: int = 0, value: float = 0.0, **options: Any) -> TrainState:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return TrainState(model, [optimizer], step=step, config_hash="same", **options)


def killed_while_saving(directory: Path, state: TrainState, at: int, fault: Any) -> bool:
    """Save in a forked child that is killed at a file event; whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            FileEvents(directory.parent, at, fault).install()
            save_checkpoint(directory, state)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("fault", ["before", "torn"])
@pytest.mark.parametrize(("before", "step"), [((), 10), ((10,), 20), ((10,), 10), ((10, 20), 30)])
def test_a_kill_at_any_file_event_of_a_save_leaves_a_sound_checkpoint(
    before: tuple[int, ...], step: int, fault: str, tmp_path: Path
) -> None:
    states = {s: fresh(s, value=s) for s in before}
    saved = fresh(step, value=step + 0.5)
    for at in range(1000):
        directory = tmp_path / str(at) / "checkpoints"
        directory.parent.mkdir()
        for state in states.values():
            save_checkpoint(directory, state)
        killed = killed_while_saving(directory, saved, at, fault)
        # `checkpoints/` appears with its first checkpoint, so its being there means that there is one.
        assert directory.exists() or (killed and not before)
        loaded = fresh()
        if directory.exists():
            assert load_checkpoint(directory, loaded) == []
            assert loaded.step in {step, max(before, default=step)}
        save_checkpoint(directory, fresh(step + 1, value=7))
        assert not list(directory.parent.rglob(".tmp-*"))
        assert len(list(directory.iterdir())) <= 2  # one that was set aside may be the second
        assert load_checkpoint(directory, loaded) == []
        assert loaded.step == step + 1
        if not killed:
            break
    assert at > 10


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path / "c", fresh(step))
    (tmp_path / "c" / "step-00000020" / "state.json").write_bytes(b"")
    save_checkpoint(tmp_path / "c", fresh(30))
    assert sorted(path.name[-2:] for path in (tmp_path / "c").iterdir()) == ["10", "20", "30"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path / "c", fresh(step))
    load_checkpoint(tmp_path / "c", state := fresh())
    assert state.step == 100_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_checkpoint_holds_what_is_not_finite(value: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weight is NaN or infinite at step 3.*Lower optim\.lr"):
        save_checkpoint(tmp_path / "c", fresh(3, value))
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_the_settings_that_differ(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", fresh(3, config={"train": {"lr": 0.1, "betas": (1, 2)}, "seed": 0}))
    other = fresh(config={"train": {"lr": 0.2, "betas": [1, 2]}, "seed": 0})
    other.config_hash = "other"
    with pytest.raises(CheckpointError, match=r"another configuration \(train\.lr: 0\.1, now 0\.2\);"):
        load_checkpoint(tmp_path / "c", other)


def test_another_world_size_is_refused_unless_elastic(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", fresh(3, world_size=2))
    with pytest.raises(CheckpointError, match=r"by 2 process\(es\), and 1 would continue; start 2 .*QTEMPER_ELASTIC"):
        load_checkpoint(tmp_path / "c", fresh())
    (line,) = load_checkpoint(tmp_path / "c", state := fresh(elastic=True))
    assert "going on" in line
    assert state.step == 3


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    save_tensors(tmp_path / "x.safetensors", {"a": weight, "b": weight}, {})


# --- the lock ----------------------------------------------------------------------------------------------------


HOLD = (
    "import sys, time; from pathlib import Path; from qtemper.run import RunDir\n"
    "with RunDir(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)"
)


def test_the_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=rf"in use by process {process.pid} on .*; wait"), run.lock():
            pass
        process.kill()
    with run.lock():
        run.create(get_recipe(DIGITS), None)  # the lock is not content
        with pytest.raises(CheckpointError, match="in use"), run.lock():
            pass
    assert not (run.path / ".lock").exists()


def _sleep(started: Any) -> None:
    started.set()
    time.sleep(60)


def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    with run.lock():
        worker = context.Process(target=_sleep, args=(started := context.Event(),))
        worker.start()
        assert started.wait(10)
    try:
        with run.lock():
            pass
    finally:
        worker.kill()
        worker.join()


def test_a_killed_creation_does_not_block_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "environment.json").write_text("{")
    run.create(get_recipe(DIGITS), None)
    with pytest.raises(CheckpointError, match="not empty"):
        run.create(get_recipe(DIGITS), None)


def test_another_experiment_is_refused_by_its_differences(tmp_path: Path) -> None:
    run, experiment = RunDir(tmp_path / "run"), get_recipe(DIGITS)
    run.create(experiment, None)
    run.require_same(experiment)
    with pytest.raises(ConfigError, match=r"train\.epochs: 25, now 3"):
        run.require_same(override(experiment, ["train.epochs=3"]))


# --- fuzz --------------------------------------------------------------------------------------------------------


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_KEYS = [
    "format",
    "step",
    "history",
    "totals",
    "param_groups",
    "python_random",
    "numpy_random",
    "world_size",
    "lr_factor",
    "config",
    "qtemper",
    "config_hash",
]


@BOUNDED
@given(changes=st.dictionaries(st.sampled_from(_KEYS), _json, min_size=1, max_size=2))
def test_a_state_document_of_any_content_raises_only_checkpoint_error(changes: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", fresh(3))
    document = json.dumps(json.loads((path / "state.json").read_text()) | changes).encode()
    (path / "state.json").write_bytes(document)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = {"size": len(document), "sha256": hashlib.sha256(document).hexdigest()}
    seal(path, manifest)
    with contextlib.suppress(CheckpointError):
        load_checkpoint(tmp_path / "c", fresh())


@BOUNDED
@given(manifest=_json | st.fixed_dictionaries({"files": _json, "sha256": _json}))
def test_a_manifest_of_any_content_raises_only_checkpoint_error(manifest: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", fresh(3))
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        load_model(tmp_path / "c", fresh().model)


@BOUNDED
@given(text=st.binary(max_size=60) | _json.map(json.dumps))
def test_a_configuration_of_any_content_raises_only_config_error(text: Any) -> None:
    with pytest.raises(ConfigError):
        from_json(text)


@BOUNDED
@given(data=st.data())
def test_a_recipe_with_any_value_anywhere_raises_only_config_error(data: Any) -> None:
    document: Any = to_dict(get_recipe(DIGITS))
    node, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(node[key], dict) and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node)))
    node[key] = data.draw(_json)
    with contextlib.suppress(ConfigError):
        assert isinstance(from_dict(document), Experiment)
