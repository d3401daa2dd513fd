"""`qtemper sweep`: what it searches, and that trials are continued, pruned, retried and reported."""

import json
import os
import shlex
import signal
import sys

import optuna
import pytest
import torch

from qtemper.cli import main
from qtemper.compare import launch, report, schedule, search, sweep
from qtemper.compare.grid import make_arms, make_runs
from qtemper.compare.launch import Job, Launcher
from qtemper.compare.record import Record
from qtemper.config import override
from qtemper.data import DataConfig, open_source
from qtemper.errors import ConfigError
from qtemper.recipes import get_recipe
from qtemper.run import RunDir
from qtemper.train.metrics import DIVERGED_EXIT

RECIPE = "digits-w2a2-tempering"
RATES = ["train.optim.lr=0.01..0.4:log"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(schedule, "POLL", 0.0)


# --- what is searched --------------------------------------------------------------------------------------------


def test_axes():
    rate, epochs, method = search.parse(["train.optim.lr=0.01..0.2:log", "train.epochs=2..9", "method=lsq, ste"])
    trial = optuna.trial.FixedTrial({"train.optim.lr": 0.0123456, "train.epochs": 3, "method": "ste"})
    assert [axis.suggest(trial) for axis in (rate, epochs, method)] == ["0.01235", "3", "ste"]
    assert rate.at(0.5) == pytest.approx((0.01 * 0.2) ** 0.5)
    assert (epochs.at(0.0), epochs.at(1.0), method.at(1.0)) == (2, 9, "ste")


def test_the_first_trials_cover_an_axis_evenly():
    places = sorted(v["x"] for v in search.spread(search.parse(["x=0.0..1.0"]), 8))
    gaps = [b - a for a, b in zip([0.0, *places], [*places, 1.0], strict=True)]
    assert max(gaps) < 0.25  # random ones: 0.34 in the mean
    assert len({tuple(v.items()) for v in search.spread(search.parse(["x=0..1.0", "y=0..1.0"]), 16, first=12)}) == 16


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "nothing to search"),
        (["x"], "cannot read 'x'"),
        (["x=1..a"], "two numbers"),
        (["x=2..1"], "must rise"),
        (["x=0..1.0:log"], "above zero"),
        (["x=1..2:lin"], "cannot read 'lin'"),
        (["x=a,a"], "twice"),
        (["x=a,b", "x=1..2"], "searched twice"),
    ],
)
def test_bad_axes_are_refused(texts, says):
    with pytest.raises(ConfigError, match=says):
        search.parse(texts)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([*RATES, "train.optim.rl=1..2"], "--search train.optim.rl.*train.optim.lr"),
        (["train.batch_size=0..8"], "--search train.batch_size.*at least 1"),
        (["bits=W2A2,4"], "--search bits.*W4A4"),
        (["seed=1,2"], "--search seed.*--seed"),
    ],
)
def test_both_ends_of_an_axis_must_fit_the_recipe(axes, says):
    with pytest.raises(ConfigError, match=says):
        sweep.plan_search(RECIPE, [], search.parse(axes))


# --- which images judge ------------------------------------------------------------------------------------------


def test_trials_are_judged_by_images_that_are_held_out():
    axes = search.parse(RATES)
    plan = sweep.plan_search("small-fit-w2a2-lsq", [], axes)
    data = plan.run(["0.1"]).experiment.data
    assert (data.train_images, data.held_out) == (10_000, 10_000)
    assert "10,000 training images that were held out" in sweep.judged_by(plan)
    assert "TEST" in sweep.judged_by(sweep.plan_search(RECIPE, ["data.held_out=0"], axes))
    assert "300 training" in sweep.judged_by(sweep.plan_search(RECIPE, ["data.held_out=300"], axes))


def test_imagenet_is_judged_by_its_test_images_only_when_told():
    recipe, axes = "imagenet-resnet18-w4a4-lsq", search.parse(RATES)
    with pytest.raises(ConfigError, match=r"imagenet.*--set data\.held_out=0"):
        sweep.plan_search(recipe, [], axes)
    assert "TEST" in sweep.judged_by(sweep.plan_search(recipe, ["data.held_out=0"], axes))


def test_held_out_images_are_the_last_ones_and_not_trained_on():
    def source(**settings):
        return open_source(DataConfig(name="digits", source="embedded", normalization="half", **settings))

    whole, held, both = source(), source(held_out=287), source(held_out=287, train_images=1000)
    assert (held.train_size, held.test_size) == (1151, 287)
    assert torch.equal(held.data.test.images, whole.data.train.images[-287:])
    assert torch.equal(held.data.train.images, whole.data.train.images[:-287])
    assert torch.equal(both.data.train.labels, whole.data.train.labels[:1000])
    for settings in ({"held_out": 438, "train_images": 1001}, {"held_out": 1438}):
        with pytest.raises(ValueError, match="1438 training images; set fewer"):
            source(**settings)
    with pytest.raises(ValueError, match="held_out"):
        DataConfig(name="imagenet", held_out=1)


def test_runs_of_before_there_were_held_out_images_keep_their_directories():
    # The hash that results/study.jsonl records of the run.
    experiment = override(get_recipe("small-fit-w2a2-tempering"), ["method=ste", "seed=0"])
    run = sweep.Run(sweep.Arm("ste", ("method=ste",)), 0, "small-fit-w2a2-tempering", experiment)
    assert run.config_hash == "3843801a7857"


# --- the trials --------------------------------------------------------------------------------------------------


class Training(Job):
    """A run in this process: one epoch a poll, the better the nearer the learning rate is to 0.05."""

    def __init__(self, launcher, run):
        self.launcher, self.run, self.stopped = launcher, run, False
        self.directory = run.directory(launcher.root)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.json").write_text("{}")
        self.log = launcher.root / "logs" / f"{self.directory.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        launcher.starts.append(run.arm.label)

    def say(self, text):
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def poll(self):
        rate = self.run.experiment.train.optim.lr
        metrics = self.directory / "metrics.jsonl"
        epoch = 1 + len(metrics.read_text().splitlines() if metrics.exists() else [])
        if self.stopped:
            return 143
        if self.launcher.fails:
            self.say(self.launcher.fails)
            return self.launcher.code
        if rate > 0.3:
            self.say("the loss became NaN")
            return DIVERGED_EXIT
        top1 = 90 - 1000 * abs(rate - 0.05) + epoch
        if epoch <= self.run.experiment.train.epochs:
            with metrics.open("a") as file:
                file.write(json.dumps({"epoch": epoch, "train_loss": 0.1, "test_top1": top1}) + "\n")
            return None
        (self.directory / "result.json").write_text(json.dumps({"top1": top1 - 1}))
        (self.directory / "final.safetensors").touch()
        return 0

    def stop(self):
        self.stopped = True

    kill = stop

    def seconds(self):
        return 1.0


class InThisProcess(Launcher):
    def __init__(self, root, fails="", code=1):
        self.root, self.fails, self.code, self.starts = root, fails, code, []

    def start(self, run):
        return Training(self, run)


def run_sweep(root, launcher, axes=RATES, trials=8, turns=None, jobs=2):
    """A sweep in this process, left alone by everyone after so many turns."""
    study = sweep.Sweep(sweep.plan_search(RECIPE, [], search.parse(axes), trials=trials), root)
    study.prepare()
    pool = schedule.Pool(launcher, root, jobs, lambda text: None)
    if turns is None:
        assert schedule.drive(pool, lambda: study.turn(pool))
    else:
        for _ in range(turns):
            study.turn(pool)
            pool.collect()
    return study


def test_trials_are_pruned_and_diverged_ones_are_not_dropped(tmp_path):
    study = run_sweep(tmp_path, InThisProcess(tmp_path), trials=12)
    records = study.records()
    assert sorted(records) == list(range(12))
    states = [r.state for r in records.values()]
    assert {"done", "pruned", "diverged"} == set(states)
    table = report.trials(records, "x")
    assert table.count("diverged: the loss became NaN") == states.count("diverged")
    best = max((r for r in records.values() if r.state == "done"), key=lambda r: r.result["top1"])
    assert f"best: --set {best.run.arm.label}" in table
    pruned = next(r for r in records.values() if r.state == "pruned")
    assert 25 // 3 < len(pruned.epochs) < 25
    report.write_trials(records, "x", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in lines] == list(range(12))
    assert {t.state.name for t in study.study.trials} == {"COMPLETE", "PRUNED", "FAIL"}


def test_a_sweep_that_was_killed_takes_its_trials_up_again(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    expected = run_sweep(alone, InThisProcess(alone), jobs=1).records()
    launchers = [InThisProcess(killed) for _ in range(4)]
    for launcher, turns in zip(launchers, (10, 1, 45, None), strict=True):
        study = run_sweep(killed, launcher, jobs=1, turns=turns)
    found = study.records()
    assert len(study.study.trials) == 8
    assert [launcher.starts[0] for launcher in launchers[:3]] == [found[0].run.arm.label] * 3
    assert report.trials(found, "x") == report.trials(expected, "x")


def test_all_of_a_few_choices_are_tried_once(tmp_path):
    launcher = InThisProcess(tmp_path)
    study = run_sweep(tmp_path, launcher, ["method=lsq,ste", "train.optim.lr=0.03,0.05"], trials=10)
    assert len(launcher.starts) == len(set(launcher.starts)) == 4
    (best,) = (line for line in report.trials(study.records(), "x").splitlines() if line.startswith("best"))
    assert best.endswith("--set train.optim.lr=0.05")


def test_the_best_trial_is_told_as_train_and_compare_take_it(tmp_path):
    common = ["bits=W3A3", "data.held_out=300", 'stages=[{"bits": "W8A8", "epochs": 1}]']
    plan = sweep.plan_search(RECIPE, common, search.parse(["bits=W2A2,W4A4", *RATES]), seed=7)
    run = plan.run(["W4A4", "0.05"])
    assert run.arm.label == "bits=W4A4 train.optim.lr=0.05"
    best = report.trials({0: Record(run, "done", result={"top1": 90.0})}, "x").splitlines()[-1]
    words = shlex.split(best.removeprefix("best: "))
    assert words[::2] == ["--set"] * (len(words) // 2)
    expected = override(run.experiment, ["data.held_out=0", "seed=0"])
    assert override(get_recipe(RECIPE), words[1::2]) == expected
    (compared,) = make_runs(RECIPE, words[1::2], make_arms([], []), [0])
    assert compared.experiment == expected


def test_what_stops_the_first_trial_stops_the_sweep_and_is_tried_again(tmp_path):
    with pytest.raises(ConfigError, match="trial [01] failed before its first epoch: give --init"):
        run_sweep(tmp_path, InThisProcess(tmp_path, "give --init", code=2), trials=3)
    study = run_sweep(tmp_path, InThisProcess(tmp_path), trials=3)
    assert [r.state for r in study.records().values()] == ["done"] * 3


def test_a_later_failure_is_reported_and_tried_again_by_the_next_command(tmp_path):
    run_sweep(tmp_path, InThisProcess(tmp_path), trials=1)
    broken = InThisProcess(tmp_path, "disk full")
    study = run_sweep(tmp_path, broken, trials=3, jobs=1)
    assert len(broken.starts) == 2 * schedule.RETRIES
    assert report.trials(study.records(), "x").count("failed: disk full") == 2
    study = run_sweep(tmp_path, InThisProcess(tmp_path), trials=3)
    assert [r.state for r in study.records().values()] == ["done"] * 3


def test_another_search_in_the_same_directory_is_refused(tmp_path):
    run_sweep(tmp_path, InThisProcess(tmp_path), trials=1)
    with pytest.raises(ConfigError, match="another search.*choose another --out"):
        run_sweep(tmp_path, InThisProcess(tmp_path), ["train.optim.lr=0.01..0.2"])


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search", "train.optim.lr"], "cannot read 'train.optim.lr'"),
        (["--search", *RATES, "--set", "seed=5"], "--seed"),
        (["--search", *RATES, "--jobs", "0"], "--jobs must be at least 1"),
        (["--search", *RATES, "--stop-after", "0"], "--stop-after"),
        (["--search", *RATES, "--status"], "no sweep in"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qtemper", "sweep", RECIPE, "--out", str(tmp_path / "x"), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.fixture
def qtemper(monkeypatch, capsys):
    """Run `qtemper ARGUMENTS` in this process, its runs too; returns what it printed."""
    monkeypatch.setattr(launch, "LocalProcesses", lambda options: InThisProcess(options.root))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["qtemper", *map(str, arguments)])
        if code:
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code == code
        else:
            main()
        return "\n".join(capsys.readouterr())

    return run


def test_the_command_stops_in_time_and_goes_on(tmp_path, qtemper):
    command = ["sweep", RECIPE, "--out", tmp_path, "--search", *RATES, "--trials", 3, "--jobs", 2]
    said = qtemper(*command, "--stop-after", 1e-9)
    assert "time is up: 0 of 0 runs" in said
    said = qtemper(*command)
    assert said.count("| done") == 3
    assert "top-1 is of 287 training images that were held out" in said
    assert qtemper(*command, "--status").strip() == (tmp_path / "trials.md").read_text().strip()
    with RunDir(tmp_path).lock():
        assert "is in use by" in qtemper(*command, code=4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_and_keeps_their_seconds(signum, tmp_path, qtemper, monkeypatch):
    poll = Training.poll

    def poll_and_signal(self):
        if not self.stopped:
            os.kill(os.getpid(), signum)
        return poll(self)

    command = ["compare", RECIPE, "--out", tmp_path, "--vary", "train.optim.lr=0.04,0.05", "--set", "train.epochs=3"]
    monkeypatch.setattr(Training, "poll", poll_and_signal)
    said = qtemper(*command, code=128 + signum)
    assert f"stopped by {signum.name}; the same command goes on" in said
    (note,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json"))
    assert (note["state"], note["seconds"]) == ("started", 1.0)
    monkeypatch.setattr(Training, "poll", poll)
    assert "train.optim.lr=0.05" in qtemper(*command)
    assert "2 done of 2" in qtemper(*command, "--status")
