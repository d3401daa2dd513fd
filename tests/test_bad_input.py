"""Wrong uses, one table: each ends in one clear line that says what is wrong and what to do, nothing half-written."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import qtemper
from qtemper import BitPolicy, Rule, calibrate, get_method, make_plan, prepare, set_progress
from qtemper.cli import main
from qtemper.config import Experiment, override
from qtemper.methods.lsq import LSQ
from qtemper.models import ModelConfig, build
from qtemper.recipes import get_recipe
from qtemper.requantize import requantize
from qtemper.run import RunDir
from qtemper.schedules import Step
from qtemper.train import OptimConfig, TrainConfig
from qtemper.train.snapshot import TrainState
from qtemper.train.state import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

Thunk = Callable[[], object]

ALL = BitPolicy(4, 4, first_last="same")
DIGITS = "digits-w2a2-tempering"
CIFAR = "cifar10-resnet20-w2a2-tempering"
# Every CLI row could train: keep it short, in case a wrong use goes through.
TINY = ("--set", "train.epochs=1", "--set", "float_train.epochs=1")


# --- models and batches ------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def batch() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def net_with(value: float) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = value
    return model


def prepared_with_norm() -> nn.Sequential:
    return prepare(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), "lsq", ALL)


def prepared(policy: BitPolicy = ALL) -> nn.Module:
    return prepare(net(), "lsq", policy)


class Skips(nn.Module):
    """A model with a layer that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def with_lstm() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    return Net()


def with_attention() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mixer = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mixer(x, x, x)[0])

    return Net()


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(next(m for m in model.modules() if isinstance(m, nn.Linear)), "weight", 0.5)
    return model


def with_weight_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


def bits(weight: Any) -> Thunk:
    return lambda: prepare(net(), "lsq", BitPolicy(weight, 4))


def consumed() -> Iterator[Tensor]:
    batches = iter([batch()])
    next(batches)
    return batches


def edited_plan(**changes: Any) -> Thunk:
    def wrong() -> None:
        plan = make_plan(net(), ALL)
        plan.set("2", "weight", **changes)
        prepare(net(), "lsq", plan)

    return wrong


# --- the command, in this process --------------------------------------------------------------------------------


class Refused(ValueError):
    """What `qtemper` said on stderr before it exited with 2."""


def command(*arguments: object) -> Thunk:
    """`qtemper ARGUMENTS`, which must exit with 2 after one line."""

    def wrong() -> None:
        argv, errors = sys.argv, io.StringIO()
        sys.argv = ["qtemper", *map(str, arguments)]
        try:
            with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as exit_:
                main()
        finally:
            sys.argv = argv
        assert exit_.value.code == 2, errors.getvalue()
        line = errors.getvalue().removesuffix("\n")
        assert line.startswith("qtemper: ")
        raise Refused(line.removeprefix("qtemper: "))

    return wrong


def train(*arguments: object, recipe: str = DIGITS) -> Callable[[Path], Thunk]:
    return lambda tmp: command("train", recipe, "--out", tmp / "run", *TINY[: 2 if recipe == CIFAR else 4], *arguments)


def setting(assignment: str) -> Callable[[Path], Thunk]:
    return train("--set", assignment)


def written(tmp: Path, name: str, content: bytes) -> Path:
    (tmp / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp / name).write_bytes(content)
    return tmp / name


def float_weights(
    tmp: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None, **model: Any
) -> Path:
    tensors = {
        k: v.clone() for k, v in build(ModelConfig(**{"arch": "small", "in_channels": 1} | model)).state_dict().items()
    }
    change(tensors)
    save_file(tensors, tmp / "float.safetensors")
    return tmp / "float.safetensors"


def cifar_without_data(tmp: Path) -> Thunk:
    return train("--init", float_weights(tmp, arch="resnet20", in_channels=3), recipe=CIFAR)(tmp)


def cifar_at_wrong_path(tmp: Path) -> Thunk:
    init = float_weights(tmp, arch="resnet20", in_channels=3)
    return train("--init", init, "--data", tmp / "nowhere", recipe=CIFAR)(tmp)


def cifar_damaged(tmp: Path) -> Thunk:
    init = float_weights(tmp, arch="resnet20", in_channels=3)
    written(tmp, "data/batches.meta", b"\x00" * 99)
    return train("--init", init, "--data", tmp / "data", recipe=CIFAR)(tmp)


def init_of(content: Callable[[Path], Path]) -> Callable[[Path], Thunk]:
    return lambda tmp: train("--init", content(tmp))(tmp)


def pickled(tmp: Path) -> Path:
    return written(tmp, "model.pth", pickle.dumps({"conv1.weight": [1.0]}))


def truncated(tmp: Path) -> Path:
    content = float_weights(tmp).read_bytes()
    return written(tmp, "cut.safetensors", content[: len(content) // 2])


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["conv2.weight"][0, 0, 0, 0] = float("nan")


def experiment() -> Experiment:
    return override(get_recipe(DIGITS), [a for a in TINY if a != "--set"])


def started_run(tmp: Path) -> Path:
    RunDir(tmp / "run").create(experiment(), None)
    return tmp / "run"


def resume_with(name: str, content: bytes) -> Callable[[Path], Thunk]:
    """Resume a run of which one file is not what it was."""

    def setup(tmp: Path) -> Thunk:
        written(started_run(tmp), name, content)
        return train("--resume")(tmp)

    return setup


def resume_with_other_settings(tmp: Path) -> Thunk:
    started_run(tmp)
    return train("--resume", "--set", "train.optim.lr=0.5")(tmp)


def resume_from_damaged_checkpoint(tmp: Path) -> Thunk:
    run = started_run(tmp)
    path = save_checkpoint(run / "checkpoints", TrainState(build(experiment().model), [], step=7))
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])
    return train("--resume")(tmp)


def resume_without_float_network(tmp: Path) -> Thunk:
    RunDir(tmp / "run").create(override(get_recipe(CIFAR), ["train.epochs=1"]), None)
    return train("--resume", recipe=CIFAR)(tmp)


def evaluate_with(name: str, content: bytes) -> Callable[[Path], Thunk]:
    def setup(tmp: Path) -> Thunk:
        written(started_run(tmp), name, content)
        return command("evaluate", tmp / "run")

    return setup


# --- the table ---------------------------------------------------------------------------------------------------

# id, set-up that returns the wrong thing to do, what the message must say.
Row = tuple[str, Callable[[Path], Thunk], tuple[str, ...]]

PREPARE: list[Row] = [
    ("bits-0", lambda tmp: bits(0), ("2, weight", "1 to 8", "got 0", "bits=32")),
    ("bits-9", lambda tmp: bits(9), ("2, weight", "1 to 8", "got 9", "bits=32")),
    ("bits-2.5", lambda tmp: bits(2.5), ("integer from 1 to 8", "got 2.5")),
    ("bits-True", lambda tmp: bits(True), ("integer from 1 to 8", "got True")),
    ("bits-negative", lambda tmp: bits(-1), ("1 to 8", "got -1")),
    ("policy-text", lambda tmp: lambda: prepare(net(), "lsq", "W4"), ("'W4'", "'W4A4'")),
    (
        "policy-first-last",
        lambda tmp: lambda: prepare(net(), "lsq", BitPolicy(first_last="flaot")),
        ("'flaot'", "'float'"),
    ),
    (
        "rule-granularity",
        lambda tmp: lambda: prepare(net(), "lsq", BitPolicy(rules=(Rule("2", weight_granularity="chanel"),))),
        ("'chanel'", "'channel'"),
    ),
    (
        "rule-levels",
        lambda tmp: lambda: prepare(net(), "lsq", BitPolicy(rules=(Rule("2", weight_levels="sgned"),))),
        ("Rule('2').weight_levels", "'sgned'", "'signed'"),
    ),
    (
        "rule-matches-nothing",
        lambda tmp: lambda: prepare(Skips(), "lsq", BitPolicy(rules=(Rule("unusd", 8, 8),))),
        ("'unusd'", "matches no layer", "'unused'"),
    ),
    ("plan-granularity", lambda tmp: edited_plan(granularity="chanel"), ("2, weight", "'chanel'", "'channel'")),
    ("plan-unsigned-weight", lambda tmp: edited_plan(levels="unsigned"), ("2, weight", "'signed' or 'symmetric'")),
    ("plan-field", lambda tmp: edited_plan(bit=8), ("'bit'", "'bits'")),
    (
        "prepare-nothing",
        lambda tmp: lambda: prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "lsq", "W4A4"),
        ("every layer in float", "first_last='8bit' or 'same'"),
    ),
    (
        "prepare-twice-by-plan",
        lambda tmp: lambda: prepare(prepared(), "lsq", make_plan(net(), ALL)),
        ("quantized already", "float model"),
    ),
    ("policy-number", lambda tmp: lambda: prepare(net(), "lsq", 4), ("'W4A4'", "got 4")),
    ("method-class", lambda tmp: lambda: prepare(net(), LSQ, "W4A4"), ("instance", "get_method")),
    ("rule-says-nothing", lambda tmp: lambda: Rule("2"), ("Rule('2')", "weight=8")),
    ("calibrate-one-tensor", lambda tmp: lambda: calibrate(prepared(), batch()), ("one tensor", "[x]")),
    (
        "batch-norm-batch-of-one",
        lambda tmp: lambda: calibrate(prepared_with_norm(), [batch(), batch()[:1]], batch_norm=True),
        ("too small for batch norm", "leave it out"),
    ),
    (
        "requantize-itself",
        lambda tmp: lambda: (model := prepared()) and requantize(model, model, "lsq", ALL, [batch()]),
        ("second model", "float"),
    ),
    ("optimizer", lambda tmp: lambda: OptimConfig(optimizer="SGD"), ("optimizer", "'SGD'", "'sgd'")),
    ("precision", lambda tmp: lambda: TrainConfig(precision="bfloat16"), ("precision", "'bfloat16'", "'bf16'")),
    ("milestones", lambda tmp: lambda: Step(milestones=(30, 45)), ("fractions", "[30, 45]")),
    ("ewgs-rule", lambda tmp: lambda: get_method("ewgs", rule="hesian"), ("ewgs.rule", "'hesian'", "'hessian'")),
    (
        "ewgs-delta",
        lambda tmp: lambda: get_method("ewgs", rule="fixed", delta_weight=-5.0),
        ("delta_weight", "not be negative"),
    ),
    ("plan-bits", lambda tmp: edited_plan(bits=9), ("2, weight", "1 to 8", "got 9")),
    (
        "plan-of-another-model",
        lambda tmp: lambda: prepare(net(), "lsq", make_plan(Skips(), ALL)),
        ("'used'", "make_plan"),
    ),
    (
        "weights-nan",
        lambda tmp: lambda: prepare(net_with(float("nan")), "lsq", "W4A4"),
        ("2.weight", "NaN", "sound weights"),
    ),
    (
        "weights-inf",
        lambda tmp: lambda: prepare(net_with(float("inf")), "lsq", "W4A4"),
        ("2.weight", "infinite", "sound weights"),
    ),
    ("method-unknown", lambda tmp: lambda: prepare(net(), "tempring", "W4A4"), ("'tempring'", "'tempering'")),
    ("method-setting", lambda tmp: lambda: get_method("tempering", noize="uniform"), ("'noize'", "'noise'")),
    (
        "method-correlation-on-grid",
        lambda tmp: lambda: get_method("tempering", noise="on_grid"),
        ("correlation", "zero-mean", "'on_grid'", "delta_rule='hessian'"),
    ),
    (
        "method-delta-2",
        lambda tmp: lambda: get_method("tempering", delta_weight=2.0),
        ("delta_weight", "[0, 2)", "2.0"),
    ),
    (
        "ewgs-delta-unused",
        lambda tmp: lambda: get_method("ewgs", delta_weight=0.1),
        ("rule='hessian'", "delta_weight", "rule='fixed'"),
    ),
    (
        "ewgs-delta-2",
        lambda tmp: lambda: prepare(net(), get_method("ewgs", rule="fixed", delta_weight=2.0), "W1A4"),
        ("delta", "[0, 2)", "2.0"),
    ),
    (
        "model-without-layers",
        lambda tmp: lambda: prepare(nn.Sequential(nn.ReLU()), "lsq", ALL),
        ("no layer", "Conv2d", "Linear"),
    ),
    (
        "model-lstm",
        lambda tmp: lambda: prepare(with_lstm(), "lsq", ALL),
        ("rnn (LSTM)", "Rule('rnn', weight=32, activation=32)"),
    ),
    (
        "model-attention",
        lambda tmp: lambda: prepare(with_attention(), "lsq", ALL),
        ("mixer (MultiheadAttention)", "Rule('mixer', weight=32, activation=32)"),
    ),
    (
        "model-weight-norm",
        lambda tmp: lambda: prepare(with_weight_norm(), "lsq", ALL),
        ("1 (", "remove_parametrizations", "Rule('1', weight=32, activation=32)"),
    ),
    (
        "model-lazy",
        lambda tmp: lambda: prepare(nn.Sequential(nn.LazyLinear(8)), "lsq", ALL),
        ("0 (LazyLinear)", "run one batch"),
    ),
    (
        "model-pruned",
        lambda tmp: lambda: prepare(pruned(net()), "lsq", ALL),
        ("0 (Linear)", "pruning", "Rule('0', weight=32, activation=32)"),
    ),
    (
        "model-pruned-after-prepare",
        lambda tmp: lambda: pruned(prepared()),
        ("QuantLinear", "prune the float network", "prune.remove"),
    ),
    (
        "model-pruned-after-calibrate",
        lambda tmp: lambda: pruned(calibrate(prepared(), [batch()])),
        ("QuantLinear", "prune the float network", "prune.remove"),
    ),
    (
        "prepare-twice",
        lambda tmp: lambda: prepare(prepared(), "lsq", ALL),
        ("0 (QuantLinear)", "quantized already", "float model"),
    ),
]

CALIBRATE: list[Row] = [
    ("no-batches", lambda tmp: lambda: calibrate(prepared(), []), ("no batches", "at least one")),
    (
        "consumed-iterator",
        lambda tmp: lambda: calibrate(prepared(), consumed()),
        ("no batches", "consumed iterator"),
    ),
    ("empty-batch", lambda tmp: lambda: calibrate(prepared(), [batch()[:0]]), ("the input of 0", "empty")),
    (
        "input-zero",
        lambda tmp: lambda: calibrate(prepared(), [batch() * 0]),
        ("the input of 0", "all zero", "real batches"),
    ),
    (
        "input-constant",
        lambda tmp: lambda: calibrate(prepared(), [batch() * 0 + 3]),
        ("the input of 0", "constant (3)", "real batches"),
    ),
    (
        "input-nan",
        lambda tmp: lambda: calibrate(prepared(), [batch(), batch() * float("nan")]),
        ("the input of 0", "NaN", "check"),
    ),
    (
        "input-inf",
        lambda tmp: lambda: calibrate(prepared(), [batch() / 0]),
        ("the input of 0", "infinite", "check"),
    ),
    (
        "layer-never-ran",
        lambda tmp: lambda: calibrate(prepare(Skips(), "lsq", ALL), [batch()]),
        ("the input of unused", "never seen", "Rule('unused', weight=32, activation=32)"),
    ),
    (
        "negative-on-unsigned",
        lambda tmp: (
            lambda: calibrate(
                prepared(BitPolicy(4, 4, first_last="same", rules=(Rule("0", activation_levels="unsigned"),))),
                [batch()],
            )
        ),
        ("the input of 0", "negative", "unsigned", "'signed' or 'auto'"),
    ),
    (
        "observer-unknown",
        lambda tmp: lambda: calibrate(prepared(), [batch()], observer="msee"),
        ("'msee'", "mse, percentile"),
    ),
    ("calibrate-float-model", lambda tmp: lambda: calibrate(net(), [batch()]), ("no quantizers", "prepare")),
    ("forward-before-calibrate", lambda tmp: lambda: prepared()(batch()), ("0.weight_quantizer", "calibrate")),
    (
        "progress-above-1",
        lambda tmp: lambda: set_progress(prepared(), 1.5),
        ("[0, 1]", "1.5", "step / num_steps"),
    ),
    (
        "progress-below-0",
        lambda tmp: lambda: set_progress(prepared(), -0.1),
        ("[0, 1]", "-0.1", "step / num_steps"),
    ),
    (
        "progress-nan",
        lambda tmp: lambda: set_progress(prepared(), float("nan")),
        ("[0, 1]", "nan", "step / num_steps"),
    ),
    ("progress-float-model", lambda tmp: lambda: set_progress(net(), 0.5), ("no quantizers", "prepare")),
    (
        "tempering-no-steps",
        lambda tmp: lambda: qtemper.Tempering(prepared(), 0),
        ("total_steps", "at least 1"),
    ),
]

COMMAND: list[Row] = [
    ("recipe-misspelt", train(recipe="digits-w2a2-temperin"), ("'digits-w2a2-temperin'", f"'{DIGITS}'")),
    (
        "recipe-show-misspelt",
        lambda tmp: command("recipes", "digits"),
        ("unknown recipe 'digits'", "qtemper recipes"),
    ),
    ("set-misspelt-field", setting("train.optim.lrr=0.1"), ("'train.optim.lrr'", "'train.optim.lr'")),
    ("set-misspelt-section", setting("metod=lsq"), ("'metod'", "'method'")),
    ("set-no-equals", setting("train.epochs"), ("'train.epochs'", "field.path=value")),
    ("set-wrong-type", setting("train.epochs=many"), ("train.epochs", "int", "'many'")),
    ("set-float-for-int", setting("train.epochs=1.5"), ("train.epochs", "int", "1.5")),
    ("set-out-of-range", setting("train.epochs=0"), ("epochs", "at least 1", "got 0")),
    ("set-negative-lr", setting("train.optim.lr=-1"), ("train.optim", "lr", "not be negative")),
    ("set-nan-lr", setting("train.optim.lr=NaN"), ("train.optim.lr", "finite", "nan")),
    ("set-unknown-method", setting("method=tempring"), ("'tempring'", "'tempering'")),
    ("set-unknown-choice", setting("train.precision=fp8"), ("train.precision", "float32, bf16", "'fp8'")),
    ("set-bits-9", setting("policy.weight=9"), ("weight", "1 to 8", "got 9")),
    (
        "set-all-float",
        train("--set", "policy.weight=32", "--set", "policy.activation=32"),
        ("every layer in float", "bits to 1 to 8"),
    ),
    (
        "set-correlation-on-grid",
        setting("method.noise=on_grid"),
        ("method", "zero-mean", "delta_rule='hessian'"),
    ),
    ("set-delta-2", setting("method.delta_weight=2.0"), ("delta_weight", "[0, 2)")),
    ("set-no-calibration", setting("calibration.batches=0"), ("calibration", "batches", "at least 1")),
    ("set-huge-seed", setting("seed=99999999999999999999"), ("seed", "2**63")),
    ("set-deep-json", setting("policy.rules=" + "[" * 9999), ("policy.rules",)),
    (
        "batch-larger-than-data",
        setting("train.batch_size=5000"),
        ("train.batch_size", "5000", "1438", "smaller"),
    ),
    (
        "float-batch-larger-than-data",
        setting("float_train.batch_size=5000"),
        ("float_train.batch_size", "5000", "1438", "smaller"),
    ),
    (
        "num-classes",
        setting("model.num_classes=7"),
        ("model.num_classes is 7", "10 classes", "model.num_classes=10"),
    ),
    (
        "in-channels",
        setting("model.in_channels=3"),
        ("model.in_channels is 3", "1 channel", "model.in_channels=1"),
    ),
    (
        "normalization",
        setting("data.normalization=cifar10"),
        ("data.normalization", "1 channel", "data.normalization=half"),
    ),
    ("data-missing", cifar_without_data, ("cifar10", "--data DIR")),
    ("data-wrong-path", cifar_at_wrong_path, ("nowhere", "does not hold cifar10", "cs.toronto.edu")),
    ("data-damaged", cifar_damaged, ("batches.meta is damaged", "md5", "cs.toronto.edu")),
    ("init-missing", train(recipe=CIFAR), ("float network", "--init FLOAT.safetensors")),
    ("init-not-there", init_of(lambda tmp: tmp / "no.safetensors"), ("no.safetensors", "does not exist")),
    ("init-directory", init_of(lambda tmp: tmp), ("is a directory", ".safetensors")),
    (
        "init-other-architecture",
        init_of(lambda tmp: float_weights(tmp, arch="resnet20")),
        ("does not fit", "missing", "model.*"),
    ),
    (
        "init-other-width",
        init_of(lambda tmp: float_weights(tmp, num_classes=9)),
        ("fc.weight has shape (9, 64)", "(10, 64)"),
    ),
    ("init-pickle", init_of(pickled), ("model.pth", "pickled", "safetensors.torch.save_file")),
    ("init-truncated", init_of(truncated), ("cut.safetensors", "no sound safetensors")),
    ("init-nan", init_of(lambda tmp: float_weights(tmp, poison)), ("conv2.weight", "NaN", "sound weights")),
    (
        "out-not-empty",
        lambda tmp: (written(tmp, "run/x", b""), train()(tmp))[1],
        ("not empty", "--out", "--resume"),
    ),
    (
        "out-is-a-file",
        lambda tmp: (written(tmp, "run", b"x"), train()(tmp))[1],
        ("run", "not a directory", "--out"),
    ),
    (
        "resume-without-out",
        lambda tmp: command("train", DIGITS, "--resume", *TINY),
        ("--resume", "--out RUN"),
    ),
    ("resume-no-run", train("--resume"), ("no run directory", "config.json")),
    ("resume-other-settings", resume_with_other_settings, ("other settings", "config.json")),
    ("resume-config-cut", resume_with("config.json", b'{"name": "di'), ("config.json", "JSON")),
    ("resume-config-binary", resume_with("config.json", b"\xff\xfe\x00"), ("config.json", "JSON")),
    (
        "resume-config-other-field",
        resume_with("config.json", b'{"name": "x", "dat": {}}'),
        ("config.json", "'dat'", "'data'"),
    ),
    ("resume-result-damaged", resume_with("result.json", b"{"), ("result.json", "damaged")),
    (
        "resume-damaged-checkpoint",
        resume_from_damaged_checkpoint,
        ("step-00000007", "model.safetensors", "new --out"),
    ),
    ("resume-no-float-network", resume_without_float_network, ("float network", "--init FLOAT.safetensors")),
    ("evaluate-no-run", lambda tmp: command("evaluate", tmp), ("no run directory", "config.json")),
    ("evaluate-nothing-trained", lambda tmp: command("evaluate", started_run(tmp)), ("no sound checkpoint",)),
    (
        "evaluate-damaged-final",
        evaluate_with("final.safetensors", b"\x00" * 20),
        ("final.safetensors", "no sound safetensors"),
    ),
]

TABLE = PREPARE + CALIBRATE + COMMAND


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(("setup", "words"), [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_one_clear_error(
    setup: Callable[[Path], Thunk], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a dated run directory would land
    wrong = setup(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=".") as caught:
        wrong()
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 400, message
    assert contents(tmp_path) == before


def test_the_table_is_long_enough_and_its_ids_differ() -> None:
    names = [row[0] for row in TABLE]
    assert len(names) == len(set(names)) >= 35


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (with_lstm, Rule("rnn", weight=32, activation=32)),
        (with_attention, Rule("mixer", weight=32, activation=32)),
        (with_weight_norm, Rule("1", weight=32, activation=32)),
    ],
    ids=["lstm", "attention", "weight-norm"],
)
def test_the_rule_that_a_refusal_names_works(model: Callable[[], nn.Module], rule: Rule) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    network = prepare(model(), "lsq", BitPolicy(4, 4, first_last="same", rules=(rule,)))
    calibrate(network, [x])
    assert torch.isfinite(network(x)).all()
    names = [name for name, _ in qtemper.quantizers(network)]
    assert len(names) == 2  # the one Linear's weight and input
    assert not any(name.startswith(rule.pattern + ".") for name in names)


# --- a failure leaves the model as it was ------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type, bool]], dict[str, Tensor]]:
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    return kinds, copy.deepcopy(dict(model.state_dict()))


def assert_unchanged(model: nn.Module, before: tuple[list[tuple[str, type, bool]], dict[str, Tensor]]) -> None:
    kinds, state = snapshot(model)
    assert kinds == before[0]
    assert state.keys() == before[1].keys()
    for key, value in before[1].items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        (lambda: net_with(float("nan")), ALL),
        (net, BitPolicy(4, 4, first_last="same", rules=(Rule("4", weight=9),))),
        (net, BitPolicy(rules=(Rule("nothing", weight=8),))),
        (with_weight_norm, ALL),
        (lambda: prepared(), ALL),
    ],
    ids=["nan-in-second-layer", "bits-of-last-layer", "rule", "refused-module", "prepared"],
)
def test_failing_prepare_leaves_the_model_unchanged(model: Callable[[], nn.Module], policy: BitPolicy) -> None:
    network = model()
    network[0].eval()  # mixed modes stay mixed
    before = snapshot(network)
    with pytest.raises(ValueError, match="."):
        prepare(network, "tempering", policy)
    assert_unchanged(network, before)


def raises_on_second_batch() -> Iterator[Tensor]:
    yield batch()
    raise ValueError("no second batch")


@pytest.mark.parametrize(
    "batches",
    [
        lambda: [],
        lambda: [batch() * 0],
        lambda: [batch(), batch() * float("nan")],
        lambda: [batch(), torch.zeros(4, 7)],
        raises_on_second_batch,
    ],
    ids=["empty", "zero", "nan-later", "wrong-shape-later", "iterator-raises"],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_failing_calibrate_leaves_the_model_unchanged(batches: Callable[[], Any], calibrated: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4))
    prepare(model, "tempering", ALL)
    if calibrated:
        calibrate(model, [batch()])
    model[2].eval()
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError)):
        calibrate(model, batches(), batch_norm=True)
    assert_unchanged(model, before)
    assert all(q.enabled and not q._forward_pre_hooks for _, q in qtemper.quantizers(model))
    if not calibrated:
        with pytest.raises(qtemper.NotCalibratedError):
            model(batch())
