"""Two gloo processes on this machine: they share out a batch and must do what one process does with the whole."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.faults import tiny
from benchmarks.faults.driver import Child, Trial, after_steps, signal_self
from benchmarks.faults.groups import Group, free_port, hold_store, torchrun_environment
from benchmarks.faults.rows_processes import killed_at, of_a_save, points, stopped_and_resumed
from benchmarks.faults.rows_refuse import other_world_size

import qtemper
from qtemper.methods import get_method
from qtemper.train import ProcessLostError, TrainConfig
from qtemper.train.processes import add_up_statistics, make_fabric, report_lost_process, share_noise

SETTINGS = (
    *("--set", "float_train.epochs=1", "--set", "train.epochs=1", "--set", "train.log_every=1"),
    *("--set", "train.sync_batch_norm=true", "--set", "float_train.sync_batch_norm=true"),
)


def train(out: Path, processes: int, *more: str) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "qtemper.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "digits-w2a2-tempering", "--out", str(out), *SETTINGS, *more],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_follow_one_within_the_noise_of_summation_order(tmp_path):
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    # The float network before has gone through 44 steps already, and a code that flips moves everything after it: the
    # first losses agree to the third digit, the epoch's mean to the second.
    for a, b in zip(one[:3], two[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert one[-1]["train_loss"] == pytest.approx(two[-1]["train_loss"], rel=0.05)
    assert one[-1]["test_top1"] == pytest.approx(two[-1]["test_top1"], abs=3.0)


@pytest.mark.parametrize("processes", [2, 4])
def test_activation_noise_does_not_depend_on_how_a_batch_is_shared(processes):
    torch.manual_seed(0)
    model = qtemper.prepare(torch.nn.Sequential(torch.nn.Linear(6, 6)), "noise", qtemper.BitPolicy(2, 2, "same"))
    x = torch.randn(8, 6)
    qtemper.calibrate(model, [x])
    quantizer = model[0].act_quantizer
    whole = quantizer(x)
    weight = model[0].weight
    parts = []
    for rank, part in enumerate(x.chunk(processes)):
        share_noise(model, rank)
        parts.append(quantizer(part))
        assert torch.equal(model[0].weight, weight), "weights are everyone's, and so is their noise"
    assert torch.equal(torch.cat(parts), whole)


def test_statistics_of_weights_are_not_counted_once_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    method = get_method("tempering", scale_on="both")
    model = qtemper.prepare(torch.nn.Sequential(torch.nn.Linear(6, 6)), method, qtemper.BitPolicy(2, 2, "same"))
    x = torch.randn(8, 6)
    qtemper.calibrate(model, [x])
    qtemper.set_progress(model, 0.0)
    model(x).square().mean().backward()
    layer = model[0]
    weight, activation = (q.rounding.statistics()[0] for q in (layer.weight_quantizer, layer.act_quantizer))
    before = weight.clone(), activation.clone()
    assert before[0].abs().sum() > 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(2))  # the other process has the same
    add_up_statistics(model, SimpleNamespace(world_size=2))  # type: ignore[arg-type]
    torch.testing.assert_close(weight, before[0])
    torch.testing.assert_close(activation, 2 * before[1])


# --- processes that are gone ------------------------------------------------------------------------------------


def fork(test: Any) -> Any:
    """A test that forks ranks, as the fault table does."""
    marks = [
        pytest.mark.usefixtures("one_thread"),
        pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    ]
    for mark in marks:
        test = mark(test)
    return test


def faulty(run: Path, which: int, number: int, **options: Any) -> list[Trial]:
    """Two ranks, one of which gets a signal in the middle of the second epoch."""

    def before(rank: int) -> None:
        if rank == which:
            after_steps((tiny.STEPS + 2) * tiny.OPTIMIZERS, signal_self(number))

    return Group(tiny.tiny(run, "train.timeout=10"), before, **options).wait(grace=0)


@fork
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, r"train\.timeout \(10 s\)")])
def test_a_lost_process_ends_the_others_with_one_line_and_the_run_goes_on(
    number: int, words: str, tmp_path: Path
) -> None:
    _, other = faulty(tmp_path / "run", 0, number)
    assert other.code == 2
    (line,) = [line for line in other.err.splitlines() if line.startswith("qtemper: ")]
    assert re.search(f"process 1 of 2 stops: another process .*{words}.*--resume", line)
    assert "Traceback" not in other.err
    assert other.seconds < 60
    trial = tiny.go_on(tmp_path / "run", 2, "train.timeout=10")
    assert tiny.same_end(tmp_path / "run", trial, 2, "train.timeout=10") is None


@fork
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_within_an_epoch_leaves_no_trace_whatever_the_workers(processes: int) -> None:
    assert stopped_and_resumed((2, processes)) is None


@fork
def test_two_processes_killed_in_a_save_end_as_if_they_were_not() -> None:
    for point in points(2, of_a_save)[3::30]:
        assert killed_at(point) is None


@fork
def test_another_number_of_processes_is_refused_and_the_elastic_mode_goes_on() -> None:
    assert other_world_size(2, 1) == []


@fork
def test_a_restarted_rank_does_not_take_the_address_of_a_dead_one(tmp_path: Path) -> None:
    """One store for all attempts, as torchrun's agent keeps it; in the second one a rank comes late."""
    port = free_port()
    agent = Child(lambda: hold_store(port))

    def attempt(rank: int, number: int) -> None:
        os.environ.update(torchrun_environment(rank, 2, port))
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(number))
        time.sleep(2 * number * rank)
        make_fabric(timeout=60).barrier()

    try:
        for number in range(2):
            ranks = [Child(functools.partial(attempt, rank, number)) for rank in range(2)]
            for trial in [rank.wait() for rank in ranks]:
                assert trial.code == 0, trial.err
    finally:
        agent.kill()
        agent.wait()


def test_only_what_a_lost_process_causes_is_reported_as_one() -> None:
    with pytest.raises(RuntimeError, match="^a mistake$"), report_lost_process(1.0):
        raise RuntimeError("a mistake")
    with pytest.raises(ProcessLostError, match="died"), report_lost_process(1.0):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


@pytest.mark.parametrize("timeout", [0, -1.0, 1e9])
def test_a_timeout_that_torch_cannot_take_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be 1 to 1000000 seconds"):
        TrainConfig(timeout=timeout)
