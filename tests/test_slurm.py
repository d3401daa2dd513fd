"""Runs as submitit's jobs, on this machine: a training that is requeued ends like one that was left alone."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import submitit

from qtemper.compare import grid, record, schedule
from qtemper.compare.launch import Options
from qtemper.compare.slurm import SubmititJobs
from qtemper.errors import ConfigError

RECIPE = "digits-w2a2-tempering"
LOCAL = ["cluster=local", "timeout_min=30"]
TINY = ("train.epochs=2", "float_train.epochs=1", "float_train.batch_size=256", "train.batch_size=64")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (["cluster=local"], "timeout_min=MINUTES"),
        (["timeout_min"], "cannot read 'timeout_min'"),
        (["cluster=k8s", "timeout_min=1"], "slurm or local"),
        (["cluster=local", "timeout_min=1", "partitoin=gpu"], "Unknown argument 'partitoin'"),
        (["cluster=local", "timeout_min=soon"], "timeout_min"),
        (["timeout_min=1", "partition=gpu"], "srun"),  # there is no Slurm where the tests run
    ],
)
def test_bad_parameters_are_refused(parameters, says, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=says):
        SubmititJobs(Options(tmp_path), parameters)


def child_of(pid):
    """The process that a process has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                return int(stat.parent.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for a process in /proc")
def test_a_requeued_job_continues_its_run(tmp_path):
    # Long enough that on a busy machine, too, the signal comes before the end.
    longer = ("train.epochs=12", *TINY[1:])
    (run,) = grid.make_runs(RECIPE, [], [grid.Arm("requeued", longer)], [0])
    said, interrupted = [], []
    pool = schedule.Pool(SubmititJobs(Options(tmp_path), LOCAL), tmp_path, 1, said.append)

    def turn():
        if not pool.active:
            pool.start(run)
        if (run.directory(tmp_path) / "metrics.jsonl").exists() and not interrupted:
            interrupted.append(child_of(int(pool.active[0].job.job.job_id)))
            os.kill(interrupted[0], signal.SIGUSR2)  # what Slurm sends when a job's time is nearly up
        return not interrupted

    assert schedule.drive(pool, turn)
    found = record.read(run, tmp_path)
    assert found.state == "done", said
    assert [e["epoch"] for e in found.epochs] == list(range(1, 13))
    assert found.outcome["seconds"] > 0
    assert "SIGTERM after step" in (tmp_path / "logs" / f"{run.directory(tmp_path).name}.log").read_text()
    assert not list((tmp_path / "logs").glob("*.job"))


class Lost:
    """A job of Slurm as submitit shows it: first it waits, then it is gone without a result."""

    def __init__(self, folder, job_id):
        self.folder, self.job_id, self.state, self.cancelled = folder, job_id, "PENDING", False

    def get_info(self, mode):
        return {"State": self.state}

    def done(self, force_check):
        return self.state not in ("PENDING", "RUNNING")

    def exception(self):
        return submitit.core.utils.UncompletedJobError(f"Job {self.job_id} has not produced any output\nlong story")

    def cancel(self, check):
        self.cancelled = True


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A launcher that believes to be on a cluster, and the jobs it has submitted."""
    launcher, jobs = SubmititJobs(Options(tmp_path), LOCAL), []
    monkeypatch.setattr(launcher, "cluster", "slurm")
    monkeypatch.setattr(submitit, "SlurmJob", lambda folder, job_id: next(j for j in jobs if j.job_id == job_id))

    def submit(training):
        jobs.append(Lost(tmp_path, str(len(jobs))))
        return jobs[-1]

    monkeypatch.setattr(launcher.executor, "submit", submit)
    return launcher, jobs


def test_a_job_that_is_lost_is_submitted_again_and_then_reported(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(schedule, "POLL", 0.0)
    launcher, jobs = cluster
    (run,) = grid.make_runs(RECIPE, [], [grid.Arm("lost", TINY)], [0])
    said = []
    pool = schedule.Pool(launcher, tmp_path, 1, said.append)
    pool.start(run)
    pool.collect()
    assert len(said) == 1  # a job that waits for its turn has not ended
    for number in range(schedule.RETRIES):
        jobs[number].state = "NODE_FAIL"
        pool.collect()
    assert [line.split()[0] for line in said] == ["started", "stopped"] * 2 + ["started", "failed"]
    assert record.read(run, tmp_path).outcome["message"] == "job 2 failed: Job 2 has not produced any output"
    assert record.read(run, tmp_path).outcome["seconds"] == 0.0


def test_a_job_that_outlived_its_scheduler_is_taken_over(tmp_path, cluster):
    launcher, jobs = cluster
    (run,) = grid.make_runs(RECIPE, [], [grid.Arm("left", TINY)], [0])
    launcher.start(run)
    taken = launcher.start(run)
    assert len(jobs) == 1
    taken.stop()
    assert jobs[0].cancelled
    jobs[0].state = "CANCELLED by 0"
    assert taken.poll() == 1
    launcher.start(run)
    assert len(jobs) == 2
