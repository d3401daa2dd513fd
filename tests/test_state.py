"""Checkpoints: any damage is noticed and the one before is used; hostile files cost an error and nothing else."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtemper import BitPolicy, calibrate, files, prepare
from qtemper.errors import CheckpointError
from qtemper.files import write_atomically
from qtemper.train import state as state_module
from qtemper.train.snapshot import TrainState
from qtemper.train.state import KEEP, load_checkpoint, load_model, save_checkpoint
from qtemper.weights import load_strictly, read_safetensors, save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
FIRST, SECOND = 10, 20
BOUNDED = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Loading a checkpoint sets the global generators: put them back."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])  # noqa: NPY002


def fresh(seed: int, step: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    history = [{"epoch": 1, "step": step, "train_loss": 0.1 + seed, "test_top1": None}]
    return TrainState(model, [optimizer], step=step, config_hash="same", history=history)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    save_checkpoint(directory, fresh(1, FIRST))
    save_checkpoint(directory, fresh(2, SECOND))
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def same(one: TrainState, other: TrainState) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    c, d = (s.optimizers[0].state_dict() for s in (one, other))
    moments = [
        (entry[key], d["state"][index][key]) for index, entry in c["state"].items() for key in ("step", "exp_avg")
    ]
    return (
        all(torch.equal(a[key], b[key]) for key in a)
        and all(torch.equal(x, y) for x, y in moments)
        and json.dumps(c["param_groups"]) == json.dumps(d["param_groups"])  # JSON makes lists of tuples
        and (one.step, one.history) == (other.step, other.history)
    )


def newest(directory: Path) -> Path:
    return directory / f"step-{SECOND:08d}"


def assert_the_one_before_is_used(directory: Path) -> None:
    state = fresh(3)
    messages = load_checkpoint(directory, state)
    assert len(messages) == 1
    assert f"step-{SECOND:08d} is damaged" in messages[0]
    assert "\n" not in messages[0]
    assert same(state, fresh(1, FIRST))
    assert load_model(directory, fresh(4).model)[1] == messages


# --- sound checkpoints -------------------------------------------------------------------------------------------


def test_moments_keep_the_memory_format_of_their_parameters(tmp_path: Path) -> None:
    def convolution() -> TrainState:
        model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(2, 4, 5, 5)).sum().backward()
        optimizer.step()
        return TrainState(model, [optimizer], step=1, config_hash="same")

    save_checkpoint(tmp_path, convolution())
    state = convolution()
    load_checkpoint(tmp_path, state)
    weight = state.model.weight
    moment = state.optimizers[0].state[weight]["exp_avg"]
    assert moment.stride() == weight.stride() != moment.contiguous().stride()


def test_the_newest_checkpoint_restores_everything(directory: Path) -> None:
    state = fresh(3)
    assert load_checkpoint(directory, state) == []
    assert same(state, fresh(2, SECOND))


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fresh(1, FIRST))
    expected = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    load_checkpoint(tmp_path, fresh(2))
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]  # noqa: NPY002


def test_a_checkpoint_holds_no_pickle(directory: Path) -> None:
    assert sorted(path.name for path in newest(directory).iterdir()) == sorted(FILES)
    for path in newest(directory).iterdir():
        with pytest.raises(Exception, match=".") as caught:
            pickle.loads(path.read_bytes())  # our own bytes
        assert not isinstance(caught.value, AssertionError)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (3, 100_000_000, 7, 99_999_999):
        save_checkpoint(tmp_path, fresh(1, step))
    steps = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())
    assert len(steps) == KEEP == 2
    assert max(steps) == 100_000_000


def test_saving_a_step_again_replaces_it(directory: Path) -> None:
    save_checkpoint(directory, fresh(5, SECOND))
    state = fresh(3)
    assert load_checkpoint(directory, state) == []
    assert same(state, fresh(5, SECOND))


def test_what_a_crash_leaves_is_no_checkpoint(directory: Path) -> None:
    shutil.copytree(newest(directory), directory / ".tmp-00000030")
    (directory / ".tmp-00000030" / "manifest.json").unlink()
    state = fresh(3)
    assert load_checkpoint(directory, state) == []
    assert state.step == SECOND
    assert save_checkpoint(directory, fresh(6, 30)).name == "step-00000030"
    assert not list(directory.glob(".tmp-*"))


def test_tensors_of_every_kind_round_trip(tmp_path: Path) -> None:
    tensors = {
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "int64": torch.tensor(2**62),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, {"note": "…"})
    back = read_safetensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape)
        torch.testing.assert_close(back[key], value.contiguous(), rtol=0, atol=0, equal_nan=True)


# --- damaged checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(name: str, directory: Path) -> None:
    path = newest(directory) / name
    content = path.read_bytes()
    offsets = {0, 1, 7, 8, 9, len(content) - 1} | {len(content) * i // 8 for i in range(8)}
    for offset in sorted(offsets):
        path.write_bytes(content[:offset])
        assert_the_one_before_is_used(directory)
    path.write_bytes(content)
    assert load_checkpoint(directory, fresh(3)) == []


def test_a_hundred_random_single_bit_flips_are_noticed(directory: Path) -> None:
    draw = random.Random(0)
    for _ in range(100):
        path = newest(directory) / draw.choice(FILES)
        content = path.read_bytes()
        position = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        assert_the_one_before_is_used(directory)
        path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, append, make_directory], ids=["missing", "longer", "a-directory"])
def test_other_damage_is_noticed(name: str, damage: Callable[[Path], None], directory: Path) -> None:
    damage(newest(directory) / name)
    assert_the_one_before_is_used(directory)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"model.safetensors": 5}', b"\xff", b"[" * 100_000])
def test_a_manifest_of_another_kind_is_noticed(content: bytes, directory: Path) -> None:
    (newest(directory) / "manifest.json").write_bytes(content)
    assert_the_one_before_is_used(directory)


def test_where_none_is_sound_the_error_says_so_and_the_state_stays(directory: Path) -> None:
    for path in directory.glob("step-*/state.json"):
        path.write_bytes(b"")
    state, before = fresh(3, 5), fresh(3, 5)
    with pytest.raises(CheckpointError, match=r"no sound checkpoint in .*start again with a new --out") as caught:
        load_checkpoint(directory, state)
    assert str(caught.value).count("is damaged") == 2
    assert "\n" not in str(caught.value)
    assert same(state, before)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        load_checkpoint(directory / "nowhere", state)


# --- checkpoints of something else -------------------------------------------------------------------------------


def test_another_configuration_is_refused(directory: Path) -> None:
    state, before = fresh(3), fresh(3)
    state.config_hash = "other"
    with pytest.raises(CheckpointError, match="another configuration"):
        load_checkpoint(directory, state)
    assert same(state, before)


def test_another_model_is_refused(directory: Path) -> None:
    state = fresh(3)
    state.model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit.*0\.weight has shape \(4, 3\), expected \(5, 3\)"):
        load_checkpoint(directory, state)
    assert all(torch.equal(before[key], value) for key, value in state.model.state_dict().items())


def test_a_quantized_checkpoint_does_not_load_into_the_float_model(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    float_model = net()
    prepared = prepare(net(), "lsq", BitPolicy(4, 4))
    calibrate(prepared, [torch.randn(8, 4)])
    with pytest.raises(CheckpointError, match=r"unexpected 1\.weight_quantizer.* and \d+ more\. Choose"):
        load_strictly(float_model, dict(prepared.state_dict()), tmp_path)
    load_strictly(prepared, dict(float_model.state_dict()), tmp_path)  # the other way round is how training starts


# --- a disk that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", range(4))
def test_a_full_disk_leaves_the_earlier_checkpoints(
    write: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = state_module.write_synced, []

    def full(path: Path, data: bytes) -> None:
        if len(done) == write:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        done.append(path)
        real(path, data)

    monkeypatch.setattr(state_module, "write_synced", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*--resume"):
        save_checkpoint(directory, fresh(5, 30))
    assert sorted(path.name for path in directory.iterdir()) == [f"step-{s:08d}" for s in (FIRST, SECOND)]
    assert load_checkpoint(directory, state := fresh(3)) == []
    assert same(state, fresh(2, SECOND))


def test_an_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "x", b"old")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


# --- hostile safetensors -----------------------------------------------------------------------------------------


def framed(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def only_checkpoint_error(path: Path, content: bytes) -> dict[str, Tensor] | None:
    path.write_bytes(content)
    try:
        return read_safetensors(path)
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


@BOUNDED
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=framed(b"{}"))
def test_random_bytes_raise_only_checkpoint_error(content: bytes, tmp_path: Path) -> None:
    only_checkpoint_error(tmp_path / "x", content)


_numbers = st.sampled_from([0, 1, -1, 4, 8, 2**31, 2**63, 2**64, 10**30]) | st.integers(0, 64)
_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "x", None, 3]),
        "shape": st.lists(_numbers, max_size=4) | st.none() | st.text(max_size=3),
        "data_offsets": st.lists(_numbers, max_size=3) | st.none(),
        "x": st.none(),
    },
)
_headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", ""]) | st.text(max_size=3),
    _entries | st.none() | st.integers() | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers()),
    max_size=3,
)


@BOUNDED
@given(header=_headers, body=st.binary(max_size=64))
@example(header={"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, body=b"\0")
@example(header={"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, body=b"\0")
@example(header={"a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}, body=b"")
@example(header={"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 0]}}, body=b"")
@example(header={"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, body=b"\0" * 4)
def test_well_framed_headers_of_any_content_raise_only_checkpoint_error(
    header: Any, body: bytes, tmp_path: Path
) -> None:
    only_checkpoint_error(tmp_path / "x", framed(json.dumps(header).encode(), body))


@BOUNDED
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_flipped_bits_of_a_sound_file_raise_only_checkpoint_error(
    position: int, bit: int, pristine: Path, tmp_path: Path
) -> None:
    content = bytearray((newest(pristine) / "model.safetensors").read_bytes())
    content[position % len(content)] ^= 1 << bit
    tensors = only_checkpoint_error(tmp_path / "x", bytes(content))
    if tensors is not None:
        assert sum(t.numel() for t in tensors.values()) < 1000


@pytest.mark.parametrize(
    "content",
    [
        framed(b"{}", length=2**64 - 1),
        framed(b"{}", length=2**63),
        framed(b"{}", length=2**40),
        framed(b"{}", length=99_000_000),
        framed(b"[" * 1_000_000),
        framed(b'{"a":' * 200_000),
        framed(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()),
        framed(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()),
        framed(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**64]}}).encode()),
    ],
    ids=["2^64", "2^63", "terabyte", "99MB", "brackets", "nested", "huge-tensor", "overflow", "far-offset"],
)
def test_a_hostile_header_costs_no_memory(content: bytes, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="no sound safetensors file") as caught:
        read_safetensors(tmp_path / "x")
    assert len(str(caught.value)) < 600
    # KiB on Linux. The largest file here has 1 MB; a header believed would take from 99 MB on.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    for name, content in {"x.pth": pickle.dumps(Bomb()), "x.safetensors": pickle.dumps({"a": Bomb()})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"never opened.*safetensors\.torch\.save_file"):
            read_safetensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
