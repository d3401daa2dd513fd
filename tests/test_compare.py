"""`qtemper compare`: the grid's order, its statistics, and that a killed one ends like one that was left alone."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from qtemper.compare import grid, launch, record, report, schedule
from qtemper.compare.launch import Job, Launcher, LocalProcesses, Options, log_path
from qtemper.compare.record import Record
from qtemper.compare.table import format_table, summarize
from qtemper.errors import IN_USE_EXIT, ConfigError
from qtemper.run import RunDir

RECIPE = "digits-w2a2-tempering"
STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


def pool(root, say, jobs=1):
    return schedule.Pool(LocalProcesses(Options(root)), root, jobs, say)


def test_first_seed_of_every_arm_runs_first():
    quiet = "quiet: method=tempering; method.noise=none; method.scale_on=none"
    arms = grid.make_arms(["method=lsq,ste", "bits=W2A2,W1A1"], [quiet])
    assert [a.label for a in arms[:2]] == ["method=lsq bits=W2A2", "method=lsq bits=W1A1"]
    runs = grid.make_runs(RECIPE, ["train.epochs=3"], arms, [0, 1])
    assert [r.seed for r in runs] == [0] * 5 + [1] * 5
    assert runs[1].experiment.policy.weight == 1
    assert runs[4].experiment.method.noise == "none"
    assert {r.experiment.train.epochs for r in runs} == {3}
    assert len({r.config_hash for r in runs}) == 10


def test_an_axis_of_lists():
    arms = grid.make_arms(["train.optim.schedule.milestones=[0.5,0.75],[0.3]"], [])
    assert [a.label.partition("=")[2] for a in arms] == ["[0.5,0.75]", "[0.3]"]
    assert len(grid.make_arms(['stages=[{"bits":"W8A8","epochs":2},{"bits":"W4A4","epochs":2}],[]'], [])) == 2


@pytest.mark.parametrize(
    ("vary", "arms", "says"),
    [
        (["method"], [], "--vary path=value"),
        ([], ["x"], "--arm"),
        (["a=1,1"], [], "two arms"),
        (["bits=4"], [], "W4A4"),
        (["seed=1,2"], [], "'seed=1' would be overwritten.*--seeds"),
        ([], ["x: method=lsq; seed=1"], "--seeds"),
    ],
)
def test_bad_arms_are_refused(vary, arms, says):
    with pytest.raises(ConfigError, match=says):
        grid.make_arms(vary, arms)


def test_arms_from_a_file(tmp_path):
    path = tmp_path / "x.arms"
    path.write_text("# two of them\n\nste: method=ste\n  quiet: method=tempering; method.noise=none\n")
    arms = grid.make_arms([], ["lsq: method=lsq", *grid.read_arms(path)])
    assert [a.label for a in arms] == ["lsq", "ste", "quiet"]
    assert arms[2].assignments == ("method=tempering", "method.noise=none")
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match=r"x\.arms has no arm"):
        grid.read_arms(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text"):
        grid.read_arms(path)
    with pytest.raises(ConfigError, match="No such file"):
        grid.read_arms(tmp_path / "none.arms")


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.arms")), ids=lambda path: path.stem)
def test_the_studys_arms_fit_its_recipes(path):
    runs = grid.make_runs("small-fit-w1a1-tempering", [], grid.make_arms([], grid.read_arms(path)), [0])
    assert len({run.config_hash for run in runs}) == len(runs) >= 7


def test_bad_settings_name_the_arm():
    with pytest.raises(ConfigError, match="arm 'metod=lsq'.*method"):
        grid.make_runs(RECIPE, [], grid.make_arms(["metod=lsq"], []), [0])
    with pytest.raises(ConfigError, match="seeds"):
        grid.make_runs(RECIPE, [], grid.make_arms([], []), [0, 0])
    with pytest.raises(ConfigError, match="'seed = 5' would be overwritten.*--seeds"):
        grid.make_runs(RECIPE, ["seed = 5"], grid.make_arms([], []), [0])


def records(values):
    found = []
    for label, by_seed in values.items():
        for seed, top1 in by_seed.items():
            (run,) = grid.make_runs(RECIPE, [], [grid.Arm(label, (f"train.optim.momentum=0.{len(label)}",))], [seed])
            state = "diverged" if math.isnan(top1) else "done"
            found.append(Record(run, state, [{"epoch": 1, "train_loss": 0.5}], {"top1": top1}))
    return found


def test_statistics_are_paired_by_seed():
    base, other = {0: 90.0, 1: 92.0, 2: 91.0}, {0: 90.5, 1: 92.9, 2: math.nan, 3: 95.0}
    found = records({"base": base, "other": other})
    first, second = summarize(found, "base")
    assert first.mean == pytest.approx(91.0)
    assert first.deviation == pytest.approx(1.0)
    assert first.pairs == 0
    assert (second.count, second.diverged, second.pairs) == (3, 1, 2)
    assert second.difference == pytest.approx(0.7)
    interval = stats.ttest_rel([90.5, 92.9], [90.0, 92.0]).confidence_interval(0.95)
    assert second.half_width == pytest.approx(interval.high - 0.7)
    assert second.verdict == "no difference"
    assert "1 diverged" in format_table([first, second], "base")


def test_no_verdict_where_the_pairs_do_not_vary_and_their_number_is_said():
    lines = summarize(records({"ste": {0: 90.0, 1: 91.0}, "lsq": {0: 90.5, 1: 91.5, 2: 80.0}}), "ste")
    assert lines[1].verdict == ""
    assert "(2 pairs)" in format_table(lines, "ste")


def a_run(tmp_path):
    return grid.make_runs(RECIPE, [], [grid.Arm("x", ())], [0])[0]


def test_runs_of_another_float_network_are_refused(tmp_path):
    run, first, second = a_run(tmp_path), tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    RunDir(run.directory(tmp_path)).create(run.experiment, None, first)
    record.require_same_start([run], tmp_path, first)
    with pytest.raises(ConfigError, match="another float network"):
        record.require_same_start([run], tmp_path, second)
    with pytest.raises(ConfigError, match="another float network"):
        record.require_same_start([run], tmp_path, None)


def test_a_record_keeps_one_line_a_run_a_float_network_and_a_processor(tmp_path):
    path = tmp_path / "r.jsonl"
    run = a_run(tmp_path)
    lines = [Record(run, "done", environment={"init_sha256": sha}) for sha in ("z", "a")]
    assert record.append_lines(lines[:1], path) == (1, 0)
    assert record.append_lines(lines, path) == (1, 1)
    with path.open("a") as file:
        file.write('{"config_hash": "cut o')  # a crash
    other = Record(run, "diverged", environment={"init_sha256": "b"})
    elsewhere = Record(run, "done", environment={"init_sha256": "a", "cpu_flags": ["avx2"]})
    assert record.append_lines([*lines, other, elsewhere], path) == (2, 2)
    assert record.read_keys(path) == {line.key for line in [*lines, other, elsewhere]}
    assert len(path.read_text().splitlines()) == 4


def test_a_line_of_the_time_before_float_networks_were_recorded_counts_as_of_any(tmp_path):
    path, run = tmp_path / "r.jsonl", a_run(tmp_path)
    assert record.append_lines([Record(run, "done")], path) == (1, 0)
    assert record.append_lines([Record(run, "done", environment={"init_sha256": "a"})], path) == (0, 1)


@pytest.mark.parametrize("content", ['{"a": 1}\n', "[]\n", '{"config_hash"\n{}\n'])
def test_a_record_that_is_none_is_refused_before_the_runs(content, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    done = subprocess.run(command(tmp_path / "out", "--record", str(path)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "line 1 of" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_single_seed_has_no_interval():
    (_, line) = summarize(records({"base": {0: 90.0}, "other": {0: 80.0}}), "base")
    assert math.isnan(line.half_width)
    assert line.verdict == ""


def command(out, *more):
    arms = ["--vary", "method=lsq,tempering", "--seeds", "0", "1", "--set", "train.epochs=4"]
    arms += ["--set", "float_train.epochs=1", "--set", "train.log_every=5", "--baseline", "method=lsq"]
    return [sys.executable, "-m", "qtemper.cli", "compare", RECIPE, "--out", str(out), "--jobs", "2", *arms, *more]


def test_a_killed_comparison_ends_like_one_left_alone(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run(command(alone), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(killed.glob("runs/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = subprocess.run(command(killed, "--status"), check=True, capture_output=True, text=True, timeout=100).stdout
    assert "of 4" in said
    lines = tmp_path / "lines.jsonl"
    for _ in range(2):
        subprocess.run(command(killed, "--record", str(lines)), check=True, capture_output=True, timeout=300)
    assert (killed / "table.md").read_text() == (alone / "table.md").read_text()
    assert len(lines.read_text().splitlines()) == 4


def test_runs_spread_over_the_gpus_and_are_alone_on_theirs(tmp_path, monkeypatch):
    environments, running = [], []

    def popen(command, *, env, **_):
        environments.append(env)
        running.append(SimpleNamespace(poll=lambda: None))
        return running[-1]

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    (run,) = grid.make_runs(RECIPE, [], grid.make_arms([], []), [0])
    launcher = LocalProcesses(Options(tmp_path))
    for _ in range(3):
        launcher.start(run)
    running[0].poll = running[2].poll = lambda: 0
    launcher.start(run)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["3", "5", "3", "3"]
    assert "SLURM_NTASKS" not in environments[0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.visible_gpus() == ["0", "1"]


def test_divergence_is_a_result(tmp_path):
    arms = [grid.Arm("wild", ("train.optim.lr=1e30", "train.epochs=1", "float_train.epochs=1"))]
    runs = grid.make_runs(RECIPE, [], arms, [0])
    said = []
    assert schedule.run_all(runs, pool(tmp_path, said.append))
    (found,) = [record.read(run, tmp_path) for run in runs]
    assert found.state == "diverged"
    assert "NaN" in found.line()["message"]
    assert "1 diverged" in report.status([found], 1)
    assert any(text.startswith("diverged") for text in said)


def test_bad_input_of_a_run_is_told(tmp_path):
    runs = grid.make_runs("cifar10-resnet20-w2a2-lsq", [], grid.make_arms([], []), [0])
    said = []
    assert schedule.run_all(runs, pool(tmp_path, said.append))
    assert record.read(runs[0], tmp_path).state == "failed"
    assert "--init" in said[-1]


def test_a_run_that_another_process_still_ends_is_waited_for(tmp_path, monkeypatch):
    arms = [grid.Arm("short", ("train.epochs=1", "float_train.epochs=1"))]
    (run,) = grid.make_runs(RECIPE, [], arms, [0])
    monkeypatch.setattr(schedule, "RETRIES", 1)
    lock = RunDir(run.directory(tmp_path)).lock()
    lock.__enter__()
    said = []

    def say(text):
        said.append(text)
        if "is in use by" in text:
            lock.__exit__(None, None, None)

    schedule.run_all([run], pool(tmp_path, say))
    assert any("is in use by" in text for text in said)
    assert record.read(run, tmp_path).state == "done"


class Ends(Launcher, Job):
    """Every start prints some words and has ended at once."""

    def __init__(self, root, code, words):
        self.root, self.code, self.words, self.starts = root, code, words, 0

    def start(self, run):
        self.starts += 1
        directory, log = run.directory(self.root), log_path(run, self.root)
        for folder in (directory, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").touch()
        with log.open("a") as file:
            file.write(self.words)
        return self

    def poll(self):
        return self.code

    def stop(self):
        pass

    kill = stop

    def seconds(self):
        return 1.0


def test_words_of_an_earlier_start_do_not_count(tmp_path):
    (run,) = grid.make_runs(RECIPE, [], grid.make_arms([], []), [0])
    Ends(tmp_path, 2, "no such file\n").start(run)
    killed = Ends(tmp_path, -9, "")
    looks = schedule.Pool(killed, tmp_path, 1, lambda text: None)
    looks.start(run)
    for _ in range(schedule.RETRIES + 5):
        looks.collect()
    assert killed.starts == schedule.RETRIES
    found = record.read(run, tmp_path)
    assert (found.state, found.outcome["message"]) == ("failed", "exit code -9")


def test_a_run_in_use_holds_up_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PAUSE", 1000.0)
    waits, other = grid.make_runs(RECIPE, [], grid.make_arms([], []), [0, 1])
    words = "the run is in use by process 1\nprocess 1: stopped after step 5\n"
    both = schedule.Pool(Ends(tmp_path, IN_USE_EXIT, words), tmp_path, 2, lambda text: None)
    both.start(waits)
    both.collect()
    both.launcher = Ends(tmp_path, 1, "disk full\n")
    both.start(other)
    for _ in range(schedule.RETRIES):
        both.collect()
    assert record.read(other, tmp_path).state == "failed"
    assert both.launcher.starts == schedule.RETRIES
    assert [entry.run for entry in both.active] == [waits]
    both.stop()
    assert record.read(waits, tmp_path).state == "started"


def test_a_run_that_is_tried_again_is_under_way(tmp_path):
    (run,) = grid.make_runs(RECIPE, [], grid.make_arms([], []), [0])
    again = schedule.Pool(Ends(tmp_path, 2, "no such file\n"), tmp_path, 1, lambda text: None)
    again.start(run)
    again.collect()
    assert "failed: recipe, seed 0: no such file" in report.status([record.read(run, tmp_path)], 1)
    again.start(run)
    assert "under way: recipe, seed 0" in report.status([record.read(run, tmp_path)], 1)
    assert record.read(run, tmp_path).outcome["seconds"] == 1.0
