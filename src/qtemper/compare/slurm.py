"""Runs as jobs of a Slurm cluster, through submitit.

A job executes what `launch.LocalProcesses` would. When its time is up, or it is preempted, Slurm warns it; the run
writes a checkpoint, the job is requeued and continues it. The directory must be on a file system that the nodes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, final

from qtemper.compare.grid import Run
from qtemper.compare.launch import Job, Launcher, Options, log_path, spawn
from qtemper.errors import ConfigError, optional_module

SHARED = {"cpus_per_task", "gpus_per_node", "mem_gb", "name", "nodes", "tasks_per_node", "timeout_min"}
"""submitit's names for what every cluster has; other parameters are Slurm's own."""

REQUEUES = 10**6
"""Times a job may reach its limit; submitit's 3 would not do for a run of days."""

CHECK = 10.0
"""Seconds between two questions to Slurm about a job that was asked to end."""


@final
class SubmititJobs(Launcher):
    """Every run is a job.

    Args:
        options: what all runs share.
        parameters: `name=value`: `timeout_min`, others of `SHARED`, and those of sbatch (`partition`, `account`,
            `constraint`, `signal_delay_s`, ...). `cluster=local` runs the jobs on this machine, to try them out.

    Raises:
        ConfigError: a parameter that submitit does not know, no time limit, or no Slurm here.
        ModuleNotFoundError: submitit is not installed.
    """

    def __init__(self, options: Options, parameters: list[str]) -> None:
        self.submitit = optional_module("submitit", "slurm")
        self.options = options
        given = _parse(parameters)
        self.cluster = given.pop("cluster", "slurm")
        if self.cluster not in ("slurm", "local"):
            raise ConfigError(f"--slurm: cluster must be slurm or local, got {self.cluster!r}.")
        if "timeout_min" not in given:
            raise ConfigError("--slurm needs a job's time limit: timeout_min=MINUTES.")
        settings = {"name": "qtemper", "cpus_per_task": options.threads} | given
        settings = {k if k in SHARED or k.startswith("slurm_") else f"slurm_{k}": v for k, v in settings.items()}
        try:
            limit = {f"{self.cluster}_max_num_timeout": REQUEUES}
            self.executor = self.submitit.AutoExecutor(str(options.root / "slurm"), cluster=self.cluster, **limit)
            self.executor.update_parameters(**settings)
        except (AssertionError, NameError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--slurm: {_first_line(error)}") from None

    def start(self, run: Run) -> Job:
        """See `Launcher`; a job that outlived the command that submitted it is taken over."""
        note = self._note(run)
        note.parent.mkdir(parents=True, exist_ok=True)
        job = self._left_behind(note)
        if job is None:
            try:
                job = self.executor.submit(Training(run, self.options))
            except (self.submitit.core.utils.FailedJobError, OSError) as error:
                raise ConfigError(f"--slurm: the job was not accepted: {_first_line(error)}") from None
            note.write_text(str(job.job_id))
        return _Submitted(job, note, log_path(run, self.options.root))

    def _note(self, run: Run) -> Path:
        """The file that holds the number of a run's job while it is in the cluster's hands."""
        return log_path(run, self.options.root).with_suffix(".job")

    def _left_behind(self, note: Path) -> Any:
        if self.cluster != "slurm" or not note.exists():
            return None
        job = self.submitit.SlurmJob(folder=self.executor.folder, job_id=note.read_text().strip())
        state = job.get_info(mode="force").get("State", "")
        return job if state.split(" ")[0] in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "PREEMPTED") else None


@final
class Training:
    """What a job executes; submitit calls it, and `checkpoint` when the job has to leave its node.

    Args:
        run: which run.
        options: what all runs share.
        spent: seconds that it trained before the job was requeued.
    """

    def __init__(self, run: Run, options: Options, spent: float = 0.0) -> None:
        self.run, self.options, self.spent = run, options, spent
        self.process: subprocess.Popen[bytes] | None = None
        self.begun = 0.0

    def __call__(self) -> tuple[int, float]:
        """Train; returns the exit code and the seconds."""
        self.begun = time.monotonic()
        self.process = spawn(self.run, self.options)
        # Not `wait`: it holds a lock, and `checkpoint` interrupts this very thread.
        while self.process.poll() is None:
            time.sleep(0.1)
        return self.process.returncode, self.spent + time.monotonic() - self.begun

    def checkpoint(self) -> Any:
        """Let the run write its checkpoint; returns what the requeued job executes."""
        spent = self.spent
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # it had ended already
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            spent += time.monotonic() - self.begun
        submitit = optional_module("submitit", "slurm")
        return submitit.helpers.DelayedSubmission(Training(self.run, self.options, spent))


@final
class _Submitted(Job):
    def __init__(self, job: Any, note: Path, log: Path) -> None:
        self.job, self.note, self.log = job, note, log
        self.code: int | None = None
        self.begun: float | None = None
        self.spent = 0.0
        self.asked: float | None = None

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        now = time.monotonic()
        force = self.asked is not None and now - self.asked > CHECK
        if force:
            self.asked = now
        if not self.job.done(force_check=force):
            if self.begun is None and self.job.state == "RUNNING":
                self.begun = now
            return None
        self._end(now)
        return self.code

    def _end(self, now: float) -> None:
        failure = self.job.exception()
        if failure is None:
            self.code, self.spent = self.job.result()
        else:  # killed with its node, for its memory, by hand: the scheduler reads why in the run's log
            self.code, self.spent = 1, 0.0 if self.begun is None else now - self.begun
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as log:
                log.write(f"job {self.job.job_id} failed: {_first_line(failure)}\n")
        self.note.unlink(missing_ok=True)

    def stop(self) -> None:
        # Slurm sends SIGTERM to every process of the job; the run writes its checkpoint.
        self.job.cancel(check=False)
        self.asked = time.monotonic()

    def kill(self) -> None:
        pass  # Slurm does it itself, its KillWait after the SIGTERM

    def seconds(self) -> float:
        return self.spent


def _parse(parameters: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"cannot read {text!r}; write --slurm name=value name=value.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _first_line(error: object) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
