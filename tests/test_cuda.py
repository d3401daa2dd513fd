"""On a CUDA card: the CPU's noise and losses, eager, compiled and from CUDA graphs, with nobody waiting."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtemper
from qtemper import fast
from qtemper.counter import NoiseSource
from qtemper.data import ImageData, MemorySource, Split
from qtemper.methods import available
from qtemper.models import ModelConfig, build
from qtemper.train import OptimConfig, TrainConfig, engine, fit
from qtemper.train.engine import train_step
from qtemper.train.processes import make_fabric

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # torch warns of what is done here on purpose: no TF32, and a mode in which to wait is an error.
    pytest.mark.filterwarnings("default"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    fast.use_fast_path(True)


def images(count: int, seed: int = 0) -> Split:
    """Of four kinds that a network can tell apart: one quarter of each is brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    found = torch.randint(0, 128, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for image, label in zip(found, labels.tolist(), strict=True):
        image[:, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += 100
    return Split(found, labels)


DATA = ImageData("quarters", images(512), images(256, seed=1), tuple("abcd"))


def network(method: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = build(ModelConfig("resnet20", num_classes=4))
    if method is None:
        return model
    qtemper.prepare(model, method, "W4A4")
    return qtemper.calibrate(model, [torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))])


def losses(model: nn.Module, device: str, steps: int, *, enabled: bool = True) -> list[float]:
    """Of the first steps, each on its own batch."""
    fast.use_fast_path(enabled)
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(qtemper.param_groups(model, lr=0.01), momentum=0.9)
    found = []
    for step in range(steps):
        qtemper.set_progress(model, step / steps)
        split = images(32, seed=step)
        batch = (split.images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(batch), split.labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("shape", [(1000,), (64, 48), (8, 16, 7, 5)], ids=str)
def test_noise_is_the_cpus_to_the_bit(shape: tuple[int, ...]) -> None:
    source = NoiseSource()
    source.seed(3, "layer")
    source.set_progress(0.25)
    v = torch.zeros(shape)
    expected = source(v), source.signed(v), source.dither(v)
    source.to(DEVICE)
    source.set_progress(0.25)
    v = v.to(DEVICE)
    for own, other in zip((source(v), source.signed(v), source.dither(v)), expected, strict=True):
        assert torch.equal(own.cpu(), other)


@pytest.mark.parametrize("method", available())
def test_first_steps_lose_what_they_lose_on_a_cpu(method: str) -> None:
    model = network(method)
    expected = losses(model, "cpu", 2, enabled=False)  # there the fast path may round noise to a finer grid
    for enabled in (True, False):
        # Sums are added up in another order; an activation at the edge of a bin then falls into the next one.
        assert losses(model, DEVICE, 2, enabled=enabled) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["lsq", "tempering"])
def test_fifty_steps_lose_what_the_reference_path_loses(method: str) -> None:
    model = network(method)
    ours, reference = losses(model, DEVICE, 50), losses(model, DEVICE, 50, enabled=False)
    other = losses(model, "cpu", 50, enabled=False)
    spread = torch.tensor(reference) - torch.tensor(other)  # what another order of sums makes of it
    error = torch.tensor(ours) - torch.tensor(reference)
    assert error.abs().mean() < 3 * spread.abs().mean() + 1e-3


@pytest.mark.parametrize("method", [None, *available()])
def test_a_step_waits_for_nothing(method: str | None) -> None:
    model = network(method).to(DEVICE)
    source = MemorySource(DATA.to(DEVICE), "half")
    config = TrainConfig(epochs=1, batch_size=64, optim=OptimConfig(clip_norm=1.0))
    trainer = engine._Trainer(model, source, config, 0, None, None, make_fabric())
    batches = trainer.batches(0, 0)
    for count in range(8):
        # From the second step on: the first makes what later ones use.
        with waiting_is_an_error() if count else contextlib.nullcontext():
            x, labels = next(batches)
            train_step(
                model, x, labels, trainer.loss, trainer.state.optimizers, contextlib.nullcontext(), trainer.check
            )
            trainer.state.step += 1
            trainer.advance()


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(method: str | None, out: Path | None = None, *, resume: bool = False, **options: Any) -> list[dict[str, Any]]:
    config = TrainConfig(batch_size=64, optim=OptimConfig(lr=0.02), curvature_every=0, **options)
    source = MemorySource(DATA.to(DEVICE), "half", padding=1)
    return fit(network(method), source, config, out=out, resume=resume)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("method", [None, "lsq", "tempering"])
def test_compiled_and_replayed_steps_learn_what_eager_ones_do(method: str | None, precision: str) -> None:
    expected = train(method, epochs=6, precision=precision)
    assert expected[-1]["train_loss"] < 0.7 * expected[0]["train_loss"]
    for options in ({"compile": True}, {"compile": True, "cuda_graphs": True}):
        torch.compiler.reset()
        found = train(method, epochs=6, precision=precision, **options)
        assert found[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=0.05), options
        assert found[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=0.3, abs=0.05), options


def test_a_checkpoint_goes_on_there_and_under_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("tempering", epochs=4, compile=True)

    class Enough(Exception):
        pass

    calls, evaluate = [], engine.evaluate

    def stop(*args: Any, **kwargs: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise Enough
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", stop)
        with pytest.raises(Enough):
            train("tempering", tmp_path, epochs=4, compile=True)
    # `cuda_graphs` is no part of what a checkpoint has to agree with; `compile` is.
    found = train("tempering", tmp_path, epochs=4, resume=True, compile=True, cuda_graphs=True)
    assert [epoch["step"] for epoch in found] == [epoch["step"] for epoch in whole]
    assert found[-1]["train_loss"] == pytest.approx(whole[-1]["train_loss"], rel=0.2)


def test_a_compiled_step_keeps_no_more_than_the_float_networks() -> None:
    kept = {}
    for method in (None, "lsq"):
        torch.compiler.reset()
        model = network(method).to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        step = torch.compile(model, fullgraph=True)
        x = torch.rand(256, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            step(x).square().mean().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = step(x)
        kept[method] = torch.cuda.memory_allocated() - before
        out.square().mean().backward()
    assert kept["lsq"] < 1.05 * kept[None]
