"""The engine: it learns, it repeats, it stops and resumes to the bit, and nothing diverged reaches a checkpoint."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtemper import BitPolicy, calibrate, get_method, prepare, quantizers
from qtemper.data import ImageData, MemorySource, Split
from qtemper.errors import CheckpointError
from qtemper.models import SmallConvNet
from qtemper.progress import temperature
from qtemper.quantizer import Method
from qtemper.schedules import Constant, Cosine, Exponential, Linear, Step
from qtemper.train import (
    DivergedError,
    LossConfig,
    OptimConfig,
    TrainConfig,
    TrainingInterrupted,
    engine,
    evaluate,
    fit,
)
from qtemper.train.metrics import MetricsLog
from qtemper.train.optim import build_loss, build_optimizers, set_learning_rate
from qtemper.train.snapshot import TrainState
from qtemper.train.state import load_checkpoint, load_model
from qtemper.weights import read_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, BATCH = 4, 16
STEPS = 4  # optimizer steps an epoch: 70 images, of which 6 are dropped
EPOCHS = 3


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Bright, dark, and two directions of stripes, all noisy."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.arange(8)[:, None] % 2, torch.arange(8)[None, :] % 2
    patterns = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), row.expand(8, 8), column.expand(8, 8)])

    def split(count: int) -> Split:
        labels = torch.arange(count) % CLASSES
        noise = torch.randint(0, 96, (count, 1, 8, 8), generator=generator)
        return Split((noise + 128 * patterns[labels][:, None]).to(torch.uint8), labels)

    return ImageData("stripes", split(70), split(24), tuple("abcd"))


def float_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallConvNet(CLASSES, 1, width=4)


def model_for(method: Method | str | None, seed: int = 0) -> nn.Module:
    model = float_model(seed)
    if method is not None:
        prepare(model, method, BitPolicy(2, 2))  # the noise's seed is the experiment's: a resumed run has the same
        calibrate(model, [torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))])
    return model


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "optim": OptimConfig(lr=0.1, quantizer_lr=0.01),
        "log_every": 3,
    }
    return TrainConfig(**settings | changes)


def source(data: ImageData) -> MemorySource:
    return MemorySource(data, "half", padding=1)


def train(model: nn.Module, data: ImageData, settings: TrainConfig, **options: Any) -> list[dict[str, Any]]:
    return fit(model, source(data), settings, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert different == []


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in epoch.items() if k != "images_per_second"} for epoch in history]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class AfterForwards:
    """Do something in the forward pass of the n-th training step from now (1 is the first)."""

    def __init__(self, model: nn.Module, step: int, action: Any) -> None:
        self.left, self.action = step, action
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if model.training:
            self.left -= 1
            if self.left == 0:
                self.handle.remove()
                self.action()


def interrupt(signum: int = signal.SIGINT) -> Any:
    return lambda: os.kill(os.getpid(), signum)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


# --- it learns, and repeats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "ste", "lsq", "ewgs", "noise", "tempering"])
def test_training_lowers_the_loss(method: str | None, data: ImageData) -> None:
    model = model_for(method)
    history = train(model, data, config(epochs=8))
    assert [epoch["epoch"] for epoch in history] == list(range(1, 9))
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    # Chance is 25%.
    assert history[-1]["test_top1"] == evaluate(model, source(data)) > 50


@pytest.mark.parametrize("method", [None, "tempering"])
def test_the_same_seed_twice_gives_the_same_weights_and_another_seed_others(
    method: str | None, data: ImageData
) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = model_for(method)
        history = train(model, data, config(), seed=seed)
        runs.append((weights(model), timeless(history)))
        torch.rand(3)  # the global generator's state must not matter
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0]["conv1.weight"], runs[2][0]["conv1.weight"])


def test_writing_a_run_directory_changes_nothing(data: ImageData, tmp_path: Path) -> None:
    one, two = model_for("tempering"), model_for("tempering")
    train(one, data, config())
    train(two, data, config(log_every=1, checkpoint_every=2), out=tmp_path)
    assert_same_bits(weights(one), weights(two))


# --- stop and resume ---------------------------------------------------------------------------------------------

# The default rule, `correlation`, on all tensors.
TEMPERING = get_method("tempering", scale_on="both")
RESUMED = {
    "tempering-sgd": (TEMPERING, OptimConfig(lr=0.1, quantizer_lr=0.01)),
    "tempering-adam": (TEMPERING, OptimConfig(optimizer="adam", lr=0.01, quantizer_lr=0.001)),
    "tempering-gradient": (get_method("tempering", delta_rule="gradient", delta_weight=0.1), OptimConfig(lr=0.1)),
    "ewgs-hessian": (
        get_method("ewgs", rule="hessian"),
        OptimConfig(lr=0.1, quantizer_optimizer="adam", quantizer_lr=1e-3, clip_norm=1.0),
    ),
    "float": (None, OptimConfig(optimizer="adam", lr=0.01, weight_decay=1e-2, schedule=Step())),
}


def resumable(name: str) -> tuple[Method | None, TrainConfig]:
    method, optim = RESUMED[name]
    return method, config(optim=optim, curvature_every=1, curvature_draws=2, curvature_batches=1)


@pytest.fixture(scope="module")
def uninterrupted(
    data: ImageData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Tensor], list[dict[str, Any]], list[dict[str, Any]]]]:
    done = {}
    for name in RESUMED:
        method, settings = resumable(name)
        model, out = model_for(method), tmp_path_factory.mktemp("run")
        history = timeless(train(model, data, settings, out=out))
        done[name] = weights(model), history, timeless(lines(out))
    return done


@pytest.mark.parametrize("name", RESUMED)
def test_a_crash_in_the_second_epoch_resumes_to_the_bit(
    name: str, data: ImageData, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    method, settings = resumable(name)
    model = model_for(method)
    AfterForwards(model, STEPS + 2, crash)
    with pytest.raises(Crash):
        train(model, data, settings, out=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss"')  # a crash can leave half a line
    # Nothing of the first model: a fresh process has freshly initialised weights.
    model = model_for(method, seed=5)
    history = train(model, data, settings, out=tmp_path, resume=True)
    expected = uninterrupted[name]
    assert_same_bits(weights(model), expected[0])
    assert timeless(history) == expected[1]
    assert timeless(lines(tmp_path)) == expected[2]


@pytest.mark.parametrize(("name", "key"), [("tempering-adam", "delta.averages"), ("ewgs-hessian", "delta.value")])
def test_what_a_rule_has_learned_of_the_curvature_is_among_the_compared(
    name: str, key: str, uninterrupted: dict[str, Any]
) -> None:
    found = [value for name, value in uninterrupted[name][0].items() if name.endswith(key)]
    assert len(found) == 4  # two layers, weight and input
    assert any(value.any() for value in found)


# The first, an epoch's last, one within an epoch, the very last.
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, EPOCHS * STEPS])
@pytest.mark.parametrize("name", RESUMED)
def test_a_signal_after_any_step_resumes_to_the_bit(
    name: str, step: int, data: ImageData, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    method, settings = resumable(name)
    model = model_for(method)
    AfterForwards(model, step, interrupt())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=rf"SIGINT after step {step}; checkpoint written to .*step-") as stop:
        train(model, data, settings, out=tmp_path)
    assert stop.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    model = model_for(method, seed=5)
    history = train(model, data, settings, out=tmp_path, resume=True)
    expected = uninterrupted[name]
    assert_same_bits(weights(model), expected[0])
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert [epoch["test_top1"] for epoch in history] == [epoch["test_top1"] for epoch in expected[1]]
    if step % STEPS == 0:
        assert timeless(history) == expected[1]
        assert timeless(lines(tmp_path)) == expected[2]


def test_two_stops_in_one_epoch(data: ImageData, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    method, settings = resumable("tempering-adam")
    for resume, step in ((False, 1), (True, 2)):
        model = model_for(method)
        AfterForwards(model, step, interrupt(signal.SIGTERM))
        with pytest.raises(TrainingInterrupted, match="SIGTERM") as stop:
            train(model, data, settings, out=tmp_path, resume=resume)
        assert stop.value.signum == signal.SIGTERM
    train(model := model_for(method), data, settings, out=tmp_path, resume=True)
    assert_same_bits(weights(model), uninterrupted["tempering-adam"][0])


def test_an_interrupt_without_a_directory_says_that_nothing_was_saved(data: ImageData) -> None:
    model = model_for(None)
    AfterForwards(model, 2, interrupt())
    with pytest.raises(TrainingInterrupted, match="nothing was saved"):
        train(model, data, config())


def test_a_second_interrupt_stops_at_once(data: ImageData, tmp_path: Path) -> None:
    model = model_for(None)

    def twice() -> None:
        interrupt()()
        interrupt()()

    AfterForwards(model, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, config(), out=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_off_the_main_thread_the_signals_stay_the_application_s(data: ImageData) -> None:
    histories: list[Any] = []
    thread = threading.Thread(target=lambda: histories.append(train(model_for(None), data, config(epochs=1))))
    thread.start()
    thread.join(60)
    assert len(histories) == 1


def test_resuming_a_finished_training_changes_nothing(
    data: ImageData, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    method, settings = resumable("tempering-sgd")
    train(model_for(method), data, settings, out=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    model = model_for(method, seed=5)
    history = train(model, data, settings, out=tmp_path, resume=True)
    assert_same_bits(weights(model), uninterrupted["tempering-sgd"][0])
    assert timeless(history) == uninterrupted["tempering-sgd"][1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("changes", [{"epochs": 5}, {"optim": OptimConfig(lr=0.2)}, {"batch_size": 8}])
def test_resuming_under_other_settings_is_refused(changes: dict[str, Any], data: ImageData, tmp_path: Path) -> None:
    train(model_for(None), data, config(epochs=1), out=tmp_path)
    with pytest.raises(CheckpointError, match="another configuration"):
        train(model_for(None), data, config(**{"epochs": 1} | changes), out=tmp_path, resume=True)


def test_resume_needs_a_directory_and_a_checkpoint(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set out"):
        train(model_for(None), data, config(), resume=True)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        train(model_for(None), data, config(), out=tmp_path, resume=True)


def test_a_new_training_does_not_take_over_a_used_directory(data: ImageData, tmp_path: Path) -> None:
    """Its checkpoints would be older than those there, and go; what is resumed would be the other's."""
    train(model_for(None), data, config(epochs=2), out=tmp_path)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="holds the checkpoints of a training"):
        train(model_for(None), data, config(epochs=1), out=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_a_resumed_training_passes_over_a_damaged_checkpoint(
    data: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str], uninterrupted: dict[str, Any]
) -> None:
    method, settings = resumable("tempering-adam")
    train(model_for(method), data, settings, out=tmp_path)
    newest = tmp_path / "checkpoints" / f"step-{EPOCHS * STEPS:08d}"
    (newest / "optimizer.safetensors").write_bytes(b"")
    capsys.readouterr()
    train(model := model_for(method, seed=5), data, settings, out=tmp_path, resume=True)
    assert_same_bits(weights(model), uninterrupted["tempering-adam"][0])
    assert capsys.readouterr().out.count("is damaged") == 1


def test_only_two_checkpoints_stay(data: ImageData, tmp_path: Path) -> None:
    train(model_for("tempering"), data, config(epochs=4), out=tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{3 * STEPS:08d}", f"step-{4 * STEPS:08d}"]


def test_checkpoint_every_counts_epochs_and_the_last_always_has_one(data: ImageData, tmp_path: Path) -> None:
    train(model_for(None), data, config(epochs=3, checkpoint_every=2), out=tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{2 * STEPS:08d}", f"step-{3 * STEPS:08d}"]


def test_a_checkpoint_loads_into_a_model_alone(data: ImageData, tmp_path: Path) -> None:
    trained = model_for("tempering")
    train(trained, data, config(epochs=1), out=tmp_path)
    model = prepare(float_model(seed=5), "tempering", BitPolicy(2, 2))
    assert load_model(tmp_path / "checkpoints", model)[1] == []
    assert_same_bits(weights(model), weights(trained))
    assert evaluate(model, source(data)) == evaluate(trained, source(data))


# --- divergence --------------------------------------------------------------------------------------------------


def all_finite(out: Path) -> bool:
    paths = list((out / "checkpoints").glob("step-*/model.safetensors"))
    return all(bool(torch.isfinite(t).all()) for path in paths for t in read_safetensors(path).values())


def poison(model: nn.Module) -> Any:
    def act() -> None:
        with torch.no_grad():
            model.get_parameter("fc.weight")[0, 0] = math.nan

    return act


@pytest.mark.parametrize("method", [None, "tempering"])
def test_a_loss_that_is_not_finite_ends_the_training_with_a_remedy(
    method: str | None, data: ImageData, tmp_path: Path
) -> None:
    model = model_for(method)
    AfterForwards(model, STEPS + 2, poison(model))
    with pytest.raises(DivergedError, match=r"NaN.*lower optim\.lr") as caught:
        train(model, data, config(), out=tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert all_finite(tmp_path)
    for line in lines(tmp_path):
        assert line["step"] <= STEPS
        assert math.isfinite(line.get("loss", line.get("train_loss")))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_noticed_in_its_own_step(where: str, data: ImageData) -> None:
    model = model_for("lsq")

    def spoil_gradient() -> None:
        model.fc.weight.register_hook(lambda g: g * math.inf)

    AfterForwards(model, STEPS + 2, poison(model) if where == "loss" else spoil_gradient)
    with pytest.raises(DivergedError, match=f"in step {STEPS + 2};"):
        train(model, data, config())


def test_rollback_goes_on_from_the_last_checkpoint_at_half_the_rate(data: ImageData, tmp_path: Path) -> None:
    model = model_for("tempering")
    AfterForwards(model, STEPS + 2, poison(model))
    history = train(model, data, config(on_nonfinite="rollback"), out=tmp_path)
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    assert all_finite(tmp_path)
    events = [line for line in lines(tmp_path) if "event" in line]
    assert events == [{"step": STEPS, "event": "rollback", "lr_factor": 0.5}]
    rates = {line["step"]: line["lr"] for line in lines(tmp_path) if "lr" in line}
    plain = {line["step"]: line["lr"] for line in _rates(data, tmp_path / "plain")}
    assert rates[STEPS] == plain[STEPS]
    assert rates[2 * STEPS] == pytest.approx(plain[2 * STEPS] / 2)


def _rates(data: ImageData, out: Path) -> list[dict[str, Any]]:
    train(model_for("tempering"), data, config(), out=out)
    return [line for line in lines(out) if "lr" in line]


def test_rollback_gives_up_after_three(data: ImageData, tmp_path: Path) -> None:
    model = model_for(None)

    def poison_always() -> None:
        model.register_forward_hook(lambda _m, _i, out: out * math.nan)

    AfterForwards(model, STEPS + 1, poison_always)
    with pytest.raises(DivergedError):
        train(model, data, config(on_nonfinite="rollback", evaluate_every=0), out=tmp_path)
    assert len([line for line in lines(tmp_path) if "event" in line]) == 3


def test_a_learning_rate_that_is_far_too_high_diverges_with_a_message(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="lower"):
        train(model_for(None), data, config(optim=OptimConfig(lr=1e30, momentum=0.0)), out=tmp_path)
    assert all_finite(tmp_path)


def test_weights_that_break_in_the_last_step_of_an_epoch_reach_no_checkpoint(data: ImageData, tmp_path: Path) -> None:
    """That step's own loss is finite: only the weights tell."""
    model = model_for(None)

    def break_gradient() -> None:
        parameter = model.get_parameter("fc.bias")
        handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * math.inf)[1])

    AfterForwards(model, 2 * STEPS, break_gradient)
    with pytest.raises(DivergedError, match="lower"):
        train(model, data, config(), out=tmp_path)
    assert all_finite(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


def test_an_interrupt_after_divergence_writes_no_checkpoint(data: ImageData, tmp_path: Path) -> None:
    model = model_for("tempering")

    def both() -> None:
        poison(model)()
        interrupt()()

    AfterForwards(model, STEPS + 2, both)
    with pytest.raises(DivergedError):
        train(model, data, config(log_every=1000), out=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert all_finite(tmp_path)


# --- loss, optimizers, schedules, options ------------------------------------------------------------------------


def test_label_smoothing_is_cross_entropy_s() -> None:
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss = build_loss(LossConfig(label_smoothing=0.2), None)
    target = torch.full((5, CLASSES), 0.2 / CLASSES, dtype=torch.float64)
    target[torch.arange(5), labels] += 0.8
    expected = -(target * F.log_softmax(logits.double(), dim=1)).sum(dim=1).mean()
    # float32 against float64: a few units in the last place of a sum of 20 terms.
    torch.testing.assert_close(loss(logits, labels, logits).double(), expected, rtol=1e-6, atol=1e-6)


def test_distillation_is_hintons_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(5, CLASSES, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss = build_loss(LossConfig(distillation=0.3, distillation_temperature=2.0), lambda images: other)
    soft = F.softmax(other.double() / 2, dim=1)
    divergence = (soft * (soft.log() - F.log_softmax(own.double() / 2, dim=1))).sum(dim=1).mean()
    expected = 0.7 * F.cross_entropy(own.double(), labels) + 0.3 * 4 * divergence
    torch.testing.assert_close(loss(own, labels, own).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="float teacher"):
        build_loss(LossConfig(distillation=0.3), None)


def test_distillation_trains_towards_the_teacher_and_leaves_it_alone(data: ImageData) -> None:
    teacher = float_model(seed=3)
    train(teacher, data, config(epochs=6))
    before = weights(teacher)
    student = model_for("tempering")
    settings = config(epochs=6, loss=LossConfig(distillation=1.0, distillation_temperature=2.0))
    history = train(student, data, settings, teacher=teacher)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert_same_bits(weights(teacher), before)
    assert not teacher.training


def test_label_smoothing_runs_and_keeps_the_loss_above_its_entropy(data: ImageData) -> None:
    history = train(model_for("lsq"), data, config(epochs=2, loss=LossConfig(label_smoothing=0.1)))
    wrong, right = 0.1 / CLASSES, 0.9 + 0.1 / CLASSES
    entropy = -(right * math.log(right) + (CLASSES - 1) * wrong * math.log(wrong))
    assert history[-1]["train_loss"] > entropy


@pytest.mark.parametrize("second", ["same", "sgd", "adam"])
def test_quantizer_parameters_have_their_own_rate_and_no_weight_decay(second: Any) -> None:
    model = model_for("tempering")
    settings = OptimConfig(lr=0.1, weight_decay=1e-2, quantizer_optimizer=second, quantizer_lr=0.03)
    optimizers = build_optimizers(model, settings)
    assert [type(o) for o in optimizers] == (
        [torch.optim.SGD, torch.optim.Adam] if second == "adam" else [torch.optim.SGD]
    )
    weight_group, quantizer_group = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert (weight_group["lr"], weight_group["weight_decay"]) == (0.1, 1e-2)
    assert (quantizer_group["lr"], quantizer_group["weight_decay"]) == (0.03, 0.0)
    steps = {id(p) for name, p in model.named_parameters() if name.endswith("grid.step")}
    assert {id(p) for p in quantizer_group["params"]} == steps
    assert {id(p) for p in weight_group["params"]} == {id(p) for p in model.parameters()} - steps


def test_without_a_gradient_weight_decay_moves_weights_but_no_quantizer() -> None:
    model = model_for("lsq")
    before = weights(model)
    (optimizer,) = build_optimizers(model, OptimConfig(lr=0.1, weight_decay=0.1, momentum=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = weights(model)
    for key in before:
        if key.endswith("grid.step"):
            assert torch.equal(before[key], after[key]), key
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"] * (1 - 0.1 * 0.1))


@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Cosine(1.0, 0.1), Step(1.0, 0.1, (0.5, 0.75)), Linear(), Constant(), Exponential(1.0, 1e-3)],
    ids=lambda schedule: type(schedule).__name__,
)
def test_every_step_has_its_schedule_s_learning_rate(schedule: Any, data: ImageData, tmp_path: Path) -> None:
    settings = config(log_every=1, evaluate_every=0, optim=OptimConfig(lr=0.2, quantizer_lr=0.05, schedule=schedule))
    train(model_for("lsq"), data, settings, out=tmp_path)
    total = EPOCHS * STEPS
    rates = [line["lr"] for line in lines(tmp_path) if "lr" in line]
    assert rates == [0.2 * schedule(step / total) for step in range(total)]


def test_step_schedule_falls_at_its_milestones() -> None:
    factors = [Step(1.0, 0.1, (0.5, 0.75))(i / 8) for i in range(9)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    model = model_for("lsq")
    optimizers = build_optimizers(model, OptimConfig(lr=0.2, quantizer_lr=0.05, quantizer_optimizer="adam"))
    for factor in factors:
        set_learning_rate(optimizers, factor)
        assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.2 * factor, 0.05 * factor]


def test_metrics_hold_a_line_every_few_steps_and_one_an_epoch(data: ImageData, tmp_path: Path) -> None:
    history = train(model_for("tempering"), data, config(log_every=3), out=tmp_path)
    written = lines(tmp_path)
    steps = [line for line in written if "epoch" not in line]
    epochs = [line for line in written if "epoch" in line]
    assert all(line.keys() == {"step", "loss", "top1", "temperature", "lr"} for line in steps)
    assert [line["step"] for line in steps] == [3, 4, 6, 8, 9, 12]  # every third, and each epoch's last
    assert epochs == history
    assert all(
        line.keys() == {"epoch", "step", "train_loss", "train_top1", "test_top1", "temperature", "images_per_second"}
        for line in epochs
    )
    assert all(0 <= line["train_top1"] <= 100 and line["images_per_second"] > 0 for line in epochs)
    assert [line["step"] for line in written] == sorted(line["step"] for line in written)


def test_evaluate_every(data: ImageData) -> None:
    def evaluated(every: int) -> list[bool]:
        history = train(model_for(None), data, config(evaluate_every=every))
        return [epoch["test_top1"] is not None for epoch in history]

    assert evaluated(1) == [True, True, True]
    assert evaluated(2) == [False, True, True]
    assert evaluated(0) == [False, False, True]


def test_the_temperature_ends_at_zero_and_the_float_model_has_none(data: ImageData) -> None:
    model = model_for(get_method("tempering", temperature=Exponential(1.0, 1e-3, cutoff=1e-2)))
    history = train(model, data, config())
    values = [epoch["temperature"] for epoch in history]
    assert values[0] == pytest.approx(0.1, rel=1e-6)  # 1e-3 to the power of 1/3, in float32
    assert values[1] == pytest.approx(0.01, rel=1e-6)
    assert values[2] == temperature(model) == 0.0
    assert temperature(float_model()) is None


@pytest.mark.parametrize("method", [None, "tempering", "ewgs"])
def test_bf16_trains_and_keeps_float32_weights(method: str | None, data: ImageData) -> None:
    model = model_for(method)
    history = train(model, data, config(epochs=6, precision="bf16"))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_memory_format_is_an_option_and_the_result_agrees(data: ImageData) -> None:
    results = []
    for channels_last in (True, False):
        model = model_for(None)
        results.append(train(model, data, config(epochs=1, channels_last=channels_last))[0]["train_loss"])
        strided = model.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
        assert strided is channels_last
    # Another order of float32 sums.
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_gradient_clipping_bounds_the_first_step(data: ImageData) -> None:
    model = model_for("lsq")
    before = weights(model)
    optim = OptimConfig(lr=1.0, quantizer_lr=1.0, momentum=0.0, weight_decay=0.0, schedule=Constant(), clip_norm=1e-3)
    train(model, data, replace(config(epochs=1, optim=optim), batch_size=64))
    after = weights(model)
    moved = [after[name] - before[name] for name, _ in model.named_parameters()]
    # One step of rate 1 moves by the clipped gradient; float32 rounding of weights near 1 adds to it.
    assert math.sqrt(sum(float(d.square().sum()) for d in moved)) == pytest.approx(1e-3, rel=1e-2)


def test_the_hessian_rule_is_fed_between_epochs(data: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_for(get_method("ewgs", rule="hessian"))
    train(model, data, config(curvature_every=1, curvature_draws=2, curvature_batches=1))
    deltas = [float(q.rounding.delta()) for _, q in quantizers(model)]
    assert any(delta > 0 for delta in deltas)
    assert "never measures" not in capsys.readouterr().out
    for never in (0, config().epochs):
        model = model_for(get_method("ewgs", rule="hessian"))
        train(model, data, config(curvature_every=never))
        assert all(float(q.rounding.delta()) == 0 for _, q in quantizers(model))
        assert "never measures: set train.curvature_every" in capsys.readouterr().out


def test_evaluate_keeps_the_mode_and_counts_every_image(data: ImageData) -> None:
    model = model_for("tempering").train()
    uneven = evaluate(model, source(data), batch_size=7)
    assert model.training
    assert uneven == evaluate(model.eval(), source(data), batch_size=24)
    assert not model.training
    model.train().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, source(data))
    assert model.training


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(data: ImageData, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="batch_size 71 is more than the 70 images; lower it"):
        train(model_for(None), data, config(batch_size=71), out=out)
    assert not out.exists()


def test_no_compiler_is_one_clear_error(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no no-such-compiler: install one .* --set train.compile=false"):
        train(model_for(None), data, config(compile=True), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_compiler_is_prepared_for_a_compiled_training(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(engine, "prepare_compiler", lambda: calls.append(True))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    for compiled in (False, True):
        train(model_for("lsq"), data, config(epochs=1, compile=compiled))
        assert len(calls) == compiled


def test_a_deepcopy_trains_the_same(data: ImageData) -> None:
    model = model_for("tempering")
    twin = copy.deepcopy(model)
    train(model, data, config(epochs=1))
    train(twin, data, config(epochs=1))
    assert_same_bits(weights(model), weights(twin))


def test_the_state_round_trips_through_a_checkpoint(data: ImageData, tmp_path: Path) -> None:
    model = model_for("tempering")
    settings = config(epochs=1, optim=OptimConfig(optimizer="adam", lr=0.01))
    train(model, data, settings, out=tmp_path)
    document = json.loads((tmp_path / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    other = model_for("tempering", seed=5)
    state = TrainState(other, build_optimizers(other, settings.optim), config_hash=document["config_hash"])
    assert load_checkpoint(tmp_path / "checkpoints", state) == []
    assert (state.step, len(state.history)) == (STEPS, 1)
    moments = state.optimizers[0].state_dict()["state"]
    assert moments
    assert all(float(entry["step"]) == STEPS for entry in moments.values())


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"qtemper\[tensorboard\]"):
        MetricsLog(tmp_path, tensorboard=True)
    written = []
    fake = types.SimpleNamespace(
        SummaryWriter=lambda _directory: types.SimpleNamespace(
            add_scalar=lambda *args: written.append(args), flush=lambda: None
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    MetricsLog(tmp_path, tensorboard=True).write(step=3, loss=0.5, temperature=None)
    assert written == [("loss", 0.5, 3)]
