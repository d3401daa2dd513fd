"""The command, from the outside: in this process where that shows the same, as a subprocess for signals."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qtemper import pipeline
from qtemper.cli import main
from qtemper.config import flatten, from_json, override, to_dict
from qtemper.recipes import available, get_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = "digits-w2a2-tempering"
TINY = ["float_train.epochs=1", "train.epochs=2", "train.batch_size=128", "float_train.batch_size=128"]

Command = Callable[..., tuple[str, str]]


@pytest.fixture
def qtemper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `qtemper ARGUMENTS` in this process; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["qtemper", *map(str, arguments)])
        capsys.readouterr()
        if code == 0:
            main()
        else:
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code == code
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def settings(assignments: list[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def accuracies(text: str) -> list[float]:
    """The three numbers of the table that ends a training."""
    return [float(number) for number in re.findall(r"([\d.]+)%", text.splitlines()[-1])]


# --- recipes -----------------------------------------------------------------------------------------------------


def test_recipes_lists_all_names(qtemper: Command) -> None:
    out, err = qtemper("recipes")
    assert tuple(out.split()) == available()
    assert DIGITS in out
    assert err == ""


@pytest.mark.parametrize("name", [DIGITS, "cifar10-resnet20-w1a1-ewgs", "cifar10-resnet20-float"])
def test_every_line_of_a_recipe_is_a_path_that_set_takes(name: str, qtemper: Command) -> None:
    out, _ = qtemper("recipes", name)
    lines = out.splitlines()
    assert [line.partition(" = ")[0] for line in lines] == list(flatten(to_dict(get_recipe(name))))
    assert override(get_recipe(name), lines) == get_recipe(name)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "evaluate", "recipes"]),
        (["train"], ["--data", "--init", "--out", "--set PATH=VALUE", "--resume"]),
        (["evaluate"], ["--data", "--bits", "--integer", "--json"]),
        (["export"], ["--target", "--out", "--images"]),
        (["compare"], ["--vary", "--slurm", "timeout_min=60", "--stop-after", "--status"]),
        (["sweep"], ["--search", "path=low..high:log", "held out", "--slurm", "--stop-after"]),
        (["recipes"], ["path that --set takes"]),
    ],
)
def test_help_explains_the_options(
    command: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["qtemper", *command, "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["trai", DIGITS], ["train", DIGITS, "--epochs", "3"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], qtemper: Command, tmp_path: Path) -> None:
    out, err = qtemper(*arguments, code=2)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


# --- train and evaluate ------------------------------------------------------------------------------------------


def test_train_then_evaluate(qtemper: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out, err = qtemper("train", DIGITS, "--out", run, *settings(TINY))
    assert err == ""

    # What a person sees: where, the three accuracies, and one line an epoch (no terminal here).
    assert out.splitlines()[0] == f"run directory: {run}"
    assert out.splitlines()[-1] == f"results are in {run}"
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/1", "1/2", "2/2"]
    assert all(re.search(r"loss [\d.]+ +train [\d.]+% +test [\d.]+%.* img/s$", line) for line in epochs)
    assert [" T " in line for line in epochs] == [False, True, True]
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2 + len(epochs) + 2 + 2  # and float, after calibration, the table
    float_top1, calibrated_top1, top1 = accuracies("\n".join(out.splitlines()[:-1]))

    # What is on disk.
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "environment.json",
        "final.safetensors",
        "float.safetensors",
        "metrics.jsonl",
        "result.json",
    ]
    assert from_json((run / "config.json").read_text()) == override(get_recipe(DIGITS), TINY)
    environment = json.loads((run / "environment.json").read_text())
    assert environment.keys() >= {"qtemper", "torch", "python", "cpu_flags", "gpu", "commit", "seed", "threads"}
    assert environment["seed"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1]["test_top1"] == pytest.approx(top1, abs=0.005)  # printed with two digits
    steps = 1438 // 128
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [f"step-{steps * e:08d}" for e in (1, 2)]
    result = json.loads((run / "result.json").read_text())
    assert [result[key] for key in ("float_top1", "calibrated_top1", "top1")] == pytest.approx(
        [float_top1, calibrated_top1, top1], abs=0.005
    )

    # Evaluation finds the same, on its own, from the file and from the newest checkpoint.
    evaluated = json.loads(qtemper("evaluate", run, "--json")[0])
    assert evaluated["top1"] == result["top1"]
    assert evaluated == {"run": str(run), "recipe": DIGITS, "finished": True, **result}
    assert accuracies(qtemper("evaluate", run)[0]) == [float_top1, calibrated_top1, top1]
    # At other bits, too; its own are the network itself.
    out, _ = qtemper("evaluate", run, "--bits", "W2", "w8A8", "W1")
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["at", "W2"], ["at", "w8A8"], ["at", "W1"]]
    at = json.loads(qtemper("evaluate", run, "--json", "--bits", "W2", "W1", "--batch-norm")[0])["top1_at"]
    assert out.splitlines()[2].split()[2] == f"{result['top1']:.2f}%"
    assert at.keys() == {"W2", "W1"}
    assert "name them with --bits" in qtemper("evaluate", run, "--batch-norm", code=2)[1]
    assert "write W3" in qtemper("evaluate", run, "--bits", "3", code=2)[1]
    (run / "final.safetensors").unlink()
    out, err = qtemper("evaluate", run, "--json")
    assert json.loads(out)["top1"] == result["top1"]
    assert not json.loads(out)["finished"]
    assert "has not finished its training: this is its step-" in err
    newest = max((run / "checkpoints").iterdir())
    (newest / "state.json").write_bytes(b"")
    out, err = qtemper("evaluate", run, "--json")
    assert json.loads(out)["recipe"] == DIGITS  # the message is not in the way of a program that reads this
    assert f"{newest.name} is damaged" in err

    # Resuming goes on from the checkpoint before, and ends where the training ended.
    out, _ = qtemper("train", DIGITS, "--out", run, "--resume", *settings(TINY))
    assert out.count("is damaged") == 1
    assert accuracies("\n".join(out.splitlines()[:-1])) == [float_top1, calibrated_top1, top1]
    assert json.loads(qtemper("evaluate", run, "--json")[0]) == evaluated


def test_a_float_run_and_a_quantized_one_from_its_result(qtemper: Command, tmp_path: Path) -> None:
    first = ["method=null", "train.epochs=1", "train.batch_size=359"]
    out, _ = qtemper("train", DIGITS, "--out", tmp_path / "float", *settings(first))
    (top1,) = accuracies("\n".join(out.splitlines()[:-1]))
    second = ["train.epochs=1", "train.batch_size=359", "policy.weight=4", "method=lsq"]
    init = tmp_path / "float" / "final.safetensors"
    out, _ = qtemper("train", DIGITS, "--out", tmp_path / "quantized", "--init", init, *settings(second))
    found = accuracies("\n".join(out.splitlines()[:-1]))
    assert found[0] == top1
    assert len(found) == 3
    assert out.count("epoch 1/1") == 1  # no float training


def test_set_several_times_and_the_last_one_wins(qtemper: Command, tmp_path: Path) -> None:
    assignments = [*TINY, "train.epochs=1", "method=lsq", "train.optim.schedule=step", "seed=3"]
    qtemper("train", DIGITS, "--out", tmp_path / "run", *settings(assignments))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"] == {"name": "lsq"}
    assert config["train"]["epochs"] == 1
    assert config["train"]["optim"]["schedule"]["name"] == "step"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["seed"] == config["seed"] == 3


def test_without_out_the_run_is_dated(qtemper: Command, tmp_path: Path) -> None:
    out, _ = qtemper("train", DIGITS, *settings([*TINY, "train.epochs=1", "train.batch_size=719"]))
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{DIGITS}", run.name)
    assert out.splitlines()[-1] == f"results are in runs/{run.name}"


def test_a_run_that_stopped_before_its_first_checkpoint_goes_on_from_its_float_network(
    qtemper: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignments = settings([*TINY, "train.epochs=1"])
    out, _ = qtemper("train", DIGITS, "--out", tmp_path / "whole", *assignments)
    whole = accuracies("\n".join(out.splitlines()[:-1]))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "calibrate", stop)
        qtemper("train", DIGITS, "--out", tmp_path / "run", *assignments, code=130)
    out, _ = qtemper("train", DIGITS, "--out", tmp_path / "run", *assignments, "--resume")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch ")] == ["1/1"]  # not the float one
    found = accuracies("\n".join(out.splitlines()[:-1]))
    assert len(found) == len(whole) == 3
    assert found[0] == whole[0]  # the others differ by float32 rounding: another memory format while calibrating


# --- signals -----------------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qtemper.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_resume_finishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # 5 epochs of 22 steps: long enough to be caught, short enough to be finished afterwards.
    arguments = ["train", DIGITS, "--out", run, *settings([*TINY, "train.epochs=5", "train.batch_size=64"])]
    process = start(*arguments)
    wait_for(lambda: (run / "checkpoints" / "step-00000022" / "manifest.json").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    stopped = re.search(r"stopped by SIGINT after step (\d+); checkpoint written to (\S+)\.", line)
    assert stopped, line
    assert "--resume" in line
    assert "Traceback" not in out
    assert Path(stopped[2]).name == f"step-{int(stopped[1]):08d}"
    assert (Path(stopped[2]) / "manifest.json").exists()
    assert not (run / "final.safetensors").exists()

    process = start(*arguments, "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    assert "epoch 5/5" in out
    assert "epoch 1/1" not in out  # the float network is not trained again
    assert len(accuracies("\n".join(out.splitlines()[:-1]))) == 3
    assert (run / "final.safetensors").exists()
    epochs = [json.loads(line).get("epoch") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [epoch for epoch in epochs if epoch] == list(range(1, 6))
