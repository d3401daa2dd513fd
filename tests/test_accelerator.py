"""What a training step asks of an accelerator, seen without one: on the meta device, which has no numbers to read.

Whoever reads one fails there, as does an operation on tensors of two devices; copies from the host are looked for.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtemper import calibrate, prepare
from qtemper.data import ImageData, MemorySource, Split
from qtemper.methods import available
from qtemper.models import SmallConvNet
from qtemper.train import DivergedError, OptimConfig, TrainConfig, TrainingInterrupted, engine, fit
from qtemper.train.engine import train_step
from qtemper.train.processes import Agreement

pytestmark = pytest.mark.usefixtures("one_thread")

META = SimpleNamespace(device=torch.device("meta"), world_size=1, global_rank=0, is_global_zero=True)


ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default, ATEN.index.Tensor, ATEN.index_put_.default)


class Copies(TorchDispatchMode):
    """Lists the copies between devices. (A scalar of the host is an argument of a kernel, no copy.)"""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if func in COPIES and len(devices) > 1:
            self.found.append(str(func))
        return out


class FromNumbers(TorchFunctionMode):
    """Lists tensors that are made on a device from numbers of the host, which is a copy, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device.type != "cpu" and not isinstance(args[0], Tensor):
            self.found.append(func.__name__)
        return out


class Unread(Agreement):
    """Takes what the devices have to say and looks at none of it."""

    def ask(self, value: Tensor) -> float:
        assert value.device.type == "meta"
        return 0.0


def stripes(count: int) -> Split:
    labels = torch.arange(count) % 4
    return Split(torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8), labels)


DATA = ImageData("stripes", stripes(64), stripes(16), tuple("abcd"))


def model_for(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(SmallConvNet(4, 3, width=4), method, "W4A4")
    return calibrate(model, [torch.randn(16, 3, 8, 8)])


@pytest.mark.parametrize("method", [None, *available()])
def test_a_step_neither_reads_from_the_device_nor_copies_to_it(method: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "Agreement", Unread)
    model = SmallConvNet(4, 3, width=4) if method is None else model_for(method)
    source = MemorySource(DATA.to("meta"), "half", padding=1)
    config = TrainConfig(epochs=1, batch_size=16, optim=OptimConfig(clip_norm=1.0))
    trainer = engine._Trainer(model, source, config, 0, None, None, META)  # type: ignore[arg-type]
    batches = trainer.batches(0, 0)
    images, labels = next(batches)  # what an epoch needs once is on the device from here on
    with FromNumbers() as numbers, Copies() as copies:
        for images, labels in batches:
            train_step(
                model, images, labels, trainer.loss, trainer.state.optimizers, contextlib.nullcontext(), trainer.check
            )
            trainer.state.step += 1
            trainer.advance()
    assert trainer.state.step == 3
    assert numbers.found + copies.found == []


def test_copies_are_found() -> None:
    with FromNumbers() as numbers, Copies() as copies:
        torch.tensor(1.0).to("meta")
        torch.tensor([1.0, 2.0], device="meta")
        torch.empty(3, device="meta")[torch.tensor([0, 2])]
    assert (len(copies.found), len(numbers.found)) == (2, 1)


class Late(Agreement):
    """Answers as on an accelerator: one step late."""

    def __init__(self, fabric: Any) -> None:
        super().__init__(fabric)
        self.late = True


@pytest.mark.parametrize("step", [1, 2, 4, 5])  # 4 are an epoch
def test_what_is_not_finite_is_noticed_one_step_later_and_never_kept(
    step: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(engine, "Agreement", Late)
    model, steps = model_for("lsq"), []

    def spoil(grad: Tensor) -> Tensor:
        steps.append(len(steps) + 1)
        return grad * float("inf") if len(steps) == step else grad

    model.get_parameter("fc.weight").register_hook(spoil)
    with pytest.raises(DivergedError, match=f"in step {step};"):
        fit(model, MemorySource(DATA, "half"), TrainConfig(epochs=2, batch_size=16), out=tmp_path)
    assert len(steps) == (step if step == 4 else step + 1)  # an epoch's last step is looked at before its checkpoint
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/step-*"))
    assert kept == ([] if step <= 4 else ["step-00000004"])


def test_a_late_rollback_goes_on_from_the_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "Agreement", Late)
    model, steps = model_for("lsq"), []

    def spoil(grad: Tensor) -> Tensor:
        steps.append(len(steps) + 1)
        return grad * float("nan") if len(steps) == 6 else grad

    model.get_parameter("fc.weight").register_hook(spoil)
    config = TrainConfig(epochs=2, batch_size=16, on_nonfinite="rollback")
    history = fit(model, MemorySource(DATA, "half"), config, out=tmp_path)
    assert [epoch["step"] for epoch in history] == [4, 8]
    assert len(steps) == 4 + 3 + 4  # the third step of the second epoch learns of the second


class OneOfTwo:
    """Enough of a Fabric for a process whose companion has the same numbers."""

    device, world_size, global_rank, is_global_zero = torch.device("cpu"), 2, 0, True

    def setup_module(self, module: nn.Module, **_: Any) -> nn.Module:
        return module

    def barrier(self) -> None:
        pass


def test_a_late_signal_in_the_last_evaluation_is_not_lost(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "Agreement", Late)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    model = model_for("lsq")
    model.register_forward_pre_hook(lambda *_: None if model.training else os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 4"):
        fit(model, MemorySource(DATA, "half"), TrainConfig(epochs=1, batch_size=16), fabric=OneOfTwo())  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_answers_of_a_gpu_are_the_previous_steps() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    agreement = Agreement(SimpleNamespace(device=device, world_size=1))  # type: ignore[arg-type]
    asked = [agreement.ask(torch.full((), float(step), device=device)) for step in range(1, 100)]
    assert asked == [float(step) for step in range(99)]
    assert (agreement.settle(), agreement.settle()) == (99.0, 0.0)
