"""The full tables in slices, on digits: cut short anywhere, they end as the same tables."""

import time
from typing import ClassVar

import pytest
from benchmarks import gpu_table

from qtemper import pipeline
from qtemper.compare.launch import Job, Launcher
from qtemper.run import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--dataset", "digits", "--methods", "ste", "lsq", "--bits", "W4A4", "--seeds", "0", "--jobs", "2"]
SLICE = 0.2
TINY += ["--set", "train.epochs=1", "--set", "train.batch_size=128", "--set", "float_train=null"]


class InThisProcess(Launcher):
    """Trains for real, each run when it is first looked at."""

    started: ClassVar[list[str]] = []

    def __init__(self, options):
        self.options = options

    def start(self, run):
        self.started.append(run.arm.label)
        return Training(run, self.options)


class Training(Job):
    def __init__(self, run, options):
        self.run, self.options, self.stopped = run, options, False

    def poll(self):
        if self.stopped:
            return 143
        directory = RunDir(self.run.directory(self.options.root))
        time.sleep(SLICE)  # on whatever machine, a run outlasts a slice
        pipeline.train(self.run.experiment, directory, init=self.options.init)
        return 0

    def stop(self):
        self.stopped = True

    kill = stop

    def seconds(self):
        return 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu_table, "LocalProcesses", InThisProcess)
    monkeypatch.setattr(gpu_table.schedule, "POLL", 0.0)
    monkeypatch.setattr(InThisProcess, "started", [])


def test_slices_give_the_table_of_one_piece(tmp_path, capsys):
    whole, slices = tmp_path / "whole", tmp_path / "slices"
    assert gpu_table.main([*TINY, "--out", str(whole)]) == 0
    assert InThisProcess.started == ["float", "ste W4A4", "lsq W4A4"]
    said = capsys.readouterr().out
    assert "time is up" not in said
    lines = tmp_path / "lines.jsonl"
    # Each slice is over when its first runs have ended.
    for number in range(3):
        assert gpu_table.main([*TINY, "--out", str(slices), "--stop-after", str(SLICE), "--record", str(lines)]) == 0
        said = capsys.readouterr().out
        if number == 0:
            assert "time is up: 0 of 2 runs have ended" in said
            assert "| ste W4A4 |       |" in said
    assert "time is up" not in said
    assert (slices / "tables.md").read_text() == (whole / "tables.md").read_text()
    assert (slices / "tables.md").read_text().startswith("float: ")
    assert len(lines.read_text().splitlines()) == 2
    assert not list(slices.glob("runs/*/checkpoints"))
    assert len(list(slices.glob("runs/*/final.safetensors"))) == 3


def test_the_grid_is_of_the_published_recipes():
    grid = gpu_table.Grid("cifar100", gpu_table.METHODS, gpu_table.BITS, (0, 1))
    runs = grid.runs()
    assert len({run.config_hash for run in runs}) == len(runs) == 24
    assert [run.seed for run in runs] == [0] * 12 + [1] * 12
    assert {run.experiment.train.epochs for run in (*runs, grid.float_run())} == {400}
    ewgs = next(run for run in runs if run.arm.label == "ewgs W1A1")
    assert ewgs.experiment.method.rule == "hessian"
    assert ewgs.experiment.data.name == grid.float_run().experiment.data.name == "cifar100"
    assert ewgs.experiment.model == grid.float_run().experiment.model


def test_missing_data_is_told_before_anything_starts(tmp_path, capsys):
    assert gpu_table.main(["--out", str(tmp_path / "x"), "--data", str(tmp_path)]) == 2
    assert "does not hold cifar10" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
