"""Progressive stages: killed in any of them, a run ends as one left alone; what does not fall is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qtemper import evaluation, pipeline
from qtemper.cli import print_result
from qtemper.compare.grid import Arm, make_runs
from qtemper.compare.record import read
from qtemper.config import from_json, override, to_json
from qtemper.data import open_source
from qtemper.errors import CheckpointError, ConfigError
from qtemper.recipes import get_recipe
from qtemper.run import RunDir
from qtemper.stages import Stage
from qtemper.train import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = "digits-w2a2-tempering"
STAGES = 'stages=[{"bits": "W8A8", "epochs": 1}, {"bits": "w4a4", "epochs": 2}]'
TINY = [STAGES, "float_train.epochs=1", "train.epochs=2", "data.train_images=256", "calibration.batches=1"]
STEPS = 8
"""Of an epoch."""

DIES_IN_STAGE_2 = """
import os, signal
from qtemper.cli import main
from qtemper.train import engine

save = engine.save_checkpoint

def dying(directory, state):
    if directory.parent.name == "W4A4" and state.step > 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(directory, state)

engine.save_checkpoint = dying
main()
"""


@pytest.fixture(scope="module")
def experiment():
    return override(get_recipe(DIGITS), TINY)


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory, one_thread):
    run = RunDir(tmp_path_factory.mktemp("stages") / "alone")
    pipeline.train(experiment, run)
    return run


def same_weights(one, other):
    first, second = load_file(one.final), load_file(other.final)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_killed_inside_the_second_stage(experiment, alone, tmp_path):
    run = RunDir(tmp_path / "run")
    arguments = ["train", DIGITS, "--out", str(run.path)] + [word for text in TINY for word in ("--set", text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIES_IN_STAGE_2, *arguments]
    dead = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert run.stage("W8A8").finished
    assert [path.name for path in run.stage("W4A4").checkpoints.glob("step-*")] == [f"step-{STEPS:08d}"]
    assert not run.checkpoints.exists()
    with pytest.raises(CheckpointError, match="still in its stages"):
        evaluation.load_run(run)
    pipeline.train(experiment, run, resume=True)
    assert same_weights(run, alone)
    assert run.read_result() == alone.read_result()


@pytest.mark.parametrize("stopped", [1, 3])
def test_stopped_while_a_stage_is_calibrated(stopped, experiment, alone, tmp_path, monkeypatch):
    run, calls = RunDir(tmp_path / "run"), []
    calibrate = pipeline.calibrate

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        calibrate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(experiment, run)
    pipeline.train(experiment, run, resume=True)
    assert same_weights(run, alone)
    assert run.read_result() == alone.read_result()


def test_a_stage_starts_from_the_latent_weights_of_the_one_before(experiment, alone, tmp_path, monkeypatch):
    fit, starts = pipeline.fit, []

    def watch(model, *args, **kwargs):
        starts.append({key: value.clone() for key, value in model.state_dict().items()})
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(pipeline, "fit", watch)
    still = override(experiment, ["calibration.batch_norm=false"])
    run = RunDir(tmp_path / "run")
    pipeline.train(still, run)
    ends = [load_file(part.final) for part in (run.stage("W8A8"), run.stage("W4A4"))]
    for start, end in zip(starts[2:], ends, strict=True):
        float_keys = [key for key in end if "_quantizer." not in key]
        assert "bn1.running_mean" in float_keys
        assert all(torch.equal(start[key], end[key]) for key in float_keys)
    scale = "conv2.weight_quantizer.grid.step"
    assert float(starts[3][scale].detach()) > float(starts[2][scale].detach())  # calibrated for 2 bits, not 4


def test_each_stage_is_a_complete_run_and_in_the_result(experiment, alone, capsys):
    result = alone.read_result()
    assert [(stage["bits"], stage["epochs"]) for stage in result["stages"]] == [("W8A8", 1), ("W4A4", 2)]
    for stage, bits in zip(result["stages"], (8, 4), strict=True):
        own, model = evaluation.load_run(alone.stage(stage["bits"]))
        assert (own.policy.weight, own.policy.first_last, own.stages) == (bits, experiment.policy.first_last, ())
        assert evaluate(model, open_source(own.data)) == stage["top1"]
        assert stage["float_top1"] == result["float_top1"]  # the float network's, not the latent weights'
    print_result(result)
    assert capsys.readouterr().out.split()[1:7] == ["float", "W8A8", "W4A4", "after", "calibration", "after"]
    assert from_json(to_json(experiment)) == experiment
    assert experiment.total_epochs == 5


def test_a_comparison_counts_the_epochs_of_stages(alone, tmp_path):
    (run,) = make_runs(DIGITS, TINY, [Arm("staged", ())], [0])
    directory = run.directory(tmp_path)
    directory.parent.mkdir(parents=True)
    directory.symlink_to(alone.path, target_is_directory=True)
    assert read(run, tmp_path).state == "done"
    assert read(run, tmp_path).stage_epochs == 3
    assert read(run, tmp_path).line()["stages"][0]["bits"] == "W8A8"
    # A comparison of before there were stages goes on: the same hash, the same directory.
    (plain,) = make_runs("small-fit-w2a2-tempering", [], [Arm("ste", ("method=ste",))], [0])
    assert plain.config_hash == "3843801a7857"  # its line in results/study.jsonl


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([("W8A8", 1), ("W8A8", 1)], "go down.*W8A8 is followed by W8A8"),
        ([("W4A4", 1), ("W8A8", 1)], "go down.*W4A4 is followed by W8A8"),
        ([("W4A8", 1), ("W3A9", 1)], "stage W3A9: bits are 1 to 8"),
        ([("W32A32", 1)], "32 \\(float\\) for one"),
        ([("W2A2", 1)], "the policy's own bits, W2A2"),
        ([("W8A8", 0)], "epochs must be at least 1, got 0"),
        ([("8", 1)], "'W4A4'"),
    ],
)
def test_bad_stages(stages, says):
    text = json.dumps([{"bits": bits, "epochs": epochs} for bits, epochs in stages])
    with pytest.raises(ConfigError, match=says):
        override(get_recipe(DIGITS), [f"stages={text}"])


def test_a_float_recipe_has_no_stages():
    with pytest.raises(ConfigError, match="there is no method"):
        override(get_recipe("cifar10-resnet20-float"), [STAGES, "policy.weight=2", "policy.activation=2"])
    assert override(get_recipe(DIGITS), [STAGES, "stages=[]", "method=null"]).stages == ()
    assert Stage("w8a4", 1).name == "W8A4"
