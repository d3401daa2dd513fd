"""Two gloo processes on this machine: they share out a batch and must do what one process does with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtemper
from qtemper.train.processes import share_noise

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
