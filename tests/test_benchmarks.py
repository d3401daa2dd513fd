"""The training-step benchmark: its arithmetic, what counts as saved, a whole run of two contestants; RAND on text."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import gpu_step, rand_text
from benchmarks.training_step import __main__ as command
from benchmarks.training_step.memory import saved_bytes
from benchmarks.training_step.report import summarize
from benchmarks.training_step.statistics import order, ratios, spread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def test_a_ratio_is_to_the_reference_of_the_same_round():
    # The second round ran at half speed: both contestants, so the ratio does not see it.
    assert ratios([2.0, 4.0, 3.0], [1.0, 2.0, 2.0]) == [2.0, 2.0, 1.5]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


def test_quartiles_interpolate_between_the_values():
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert (found.lower, found.median, found.upper) == (1.75, 2.5, 3.25)
    assert spread([7.0]).lower == spread([7.0]).upper == 7.0
    assert str(spread([1.0, 2.0, 3.0])) == "2.00 [1.50, 2.50]"


def test_everyone_begins_once_and_the_direction_alternates():
    assert [order("abc", n) for n in range(3)] == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]
    assert all(sorted(order("abcd", n)) == list("abcd") for n in range(8))


def test_a_contestant_that_failed_keeps_its_reason():
    def result(wall: list[float], saved: int) -> dict[str, object]:
        visits = [{"wall": [t, t], "cpu": 4 * t, "page_faults": 6} for t in wall]
        return {"visits": visits, "saved_bytes": saved, "peak_step_bytes": None}

    results = {
        "float": result([1.0, 2.0, 1.0], 100),
        "lsq": result([1.5, 2.0, 2.0], 80),
        "nncf": {"failure": "not installed: why"},
    }
    found = summarize(results)
    assert found["lsq"]["wall"] == {"median": 1.5, "lower": 1.25, "upper": 1.75}
    assert found["lsq"]["saved"] == 0.8
    assert found["lsq"]["page_faults_per_step"] == 3.0
    assert found["nncf"] == {"failure": "not installed: why"}
    with pytest.raises(ValueError, match="the reference failed: why"):
        summarize({**results, "float": {"failure": "why"}})


class Hoards(torch.autograd.Function):
    """Keeps a tensor as an attribute of its context, where hooks do not see it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.mine = torch.zeros(1000)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    layer = nn.Linear(10, 20, bias=False)
    x = torch.randn(5, 10)
    # The layer keeps x (200 bytes) and its weight (a parameter); tanh its output (400), and so does the product.
    assert saved_bytes(lambda: layer(x).tanh().sum(), layer) == 4 * (5 * 10 + 5 * 20)
    assert saved_bytes(lambda: layer(x).tanh().square().sum(), layer) == 4 * (5 * 10 + 5 * 20)
    assert saved_bytes(lambda: Hoards.apply(layer(x)).sum(), layer) == 4 * (5 * 10 + 1000)


def test_a_checkpointed_region_keeps_its_input_only():
    layer = nn.Linear(10, 20, bias=False)
    x = torch.randn(5, 10, requires_grad=True)

    def loss() -> Tensor:
        return checkpoint(lambda y: layer(y).tanh().tanh().sum(), x, use_reentrant=False)

    assert saved_bytes(loss, layer) == 4 * 5 * 10


def test_two_contestants_side_by_side(tmp_path, capsys):
    out = tmp_path / "result.json"
    chosen = ["--quick", "--contestants", "float", "lsq", "aimet", "--threads", "1", "--out", str(out)]
    assert command.main(chosen) == 0
    printed = capsys.readouterr().out
    assert "small, 32x32, batch 8, W4A4" in printed
    assert "| lsq | " in printed
    assert "not installed" in printed  # AIMET never is, and says so
    (run,) = json.loads(out.read_text())["runs"]
    assert [len(v["wall"]) for v in run["results"]["lsq"]["visits"]] == [1, 1]
    assert run["summary"]["float"]["wall"] == {"median": 1.0, "lower": 1.0, "upper": 1.0}
    assert run["environment"]["torch"] == torch.__version__
    assert run["setup"]["threads"] == 1


def test_an_unknown_contestant_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--contestants", "lsqq"])
    assert "unknown contestant 'lsqq'; known: float" in capsys.readouterr().err


def test_a_text_run_is_one_line_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = ["--width", "8", "--depth", "1", "--batch", "2", "--float-steps", "5", "--steps", "5", "--seeds", "0"]
    out = tmp_path / "rand.jsonl"
    command = ["rand_text", *tiny, "--home", str(tmp_path), "--out", str(out), "--arms", "rand max / tensor"]
    monkeypatch.setattr("sys.argv", command)
    rand_text.main()
    first = out.read_text()
    monkeypatch.setattr(rand_text.Study, "run", None)
    rand_text.main()
    assert out.read_text() == first
    (line,) = map(json.loads, first.splitlines())
    assert line["bpc"] == line["bpc_at"]["4"]  # at the bits of the training it is the trained network
    assert capsys.readouterr().out.count("rand max / tensor | 1 |") == 2


def test_steps_are_timed_and_a_failure_takes_nothing_along(tmp_path):
    out = tmp_path / "steps.json"
    small = ["--ways", "eager", "--precision", "float32", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    assert gpu_step.main([*small, "--methods", "nothing", "float", "--out", str(out)]) == 0
    failed, timed = json.loads(out.read_text())["found"]
    assert "nothing" in failed["failure"]
    assert timed["minutes_400_epochs"] == pytest.approx(timed["milliseconds"]["median"] * 195 * 400 / 6e4)
