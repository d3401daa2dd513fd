"""What a comparison says: its table, a figure where matplotlib is installed, and where it stands."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtemper.compare.record import Record
from qtemper.compare.table import Line, format_table, markdown, summarize
from qtemper.files import write_atomically


def table(records: list[Record], baseline: str | None) -> str:
    """The table of the runs that have ended."""
    return format_table(summarize(records, baseline), baseline)


def status(records: list[Record], jobs: int) -> str:
    """What is done, what is under way, and when the rest will end, judged by the runs that have ended."""
    counts = {state: sum(r.state == state for r in records) for state in ("done", "diverged", "failed")}
    lines = [", ".join(f"{n} {state}" for state, n in counts.items() if n or state == "done") + f" of {len(records)}"]
    for r in records:
        if r.state == "started":
            done, epochs = r.stage_epochs + len(r.epochs), r.run.experiment.total_epochs
            lines.append(f"under way: {r.run.arm.label}, seed {r.run.seed}, epoch {done} of {epochs}")
        if r.state == "failed":
            lines.append(f"failed: {r.run.arm.label}, seed {r.run.seed}: {r.outcome.get('message')}")
    seconds = [float(r.outcome["seconds"]) for r in records if r.state == "done" and r.outcome.get("seconds")]
    left = sum(1 - r.progress for r in records if r.state in ("waiting", "started"))
    if left and seconds:
        hours = left * sum(seconds) / len(seconds) / jobs / 3600
        lines.append(f"about {hours:.1f} hours left with {jobs} at once")
    return "\n".join(lines)


def goes_on(records: list[Record]) -> str:
    """What a command says whose time was up."""
    ended = sum(record.ended for record in records)
    return f"time is up: {ended} of {len(records)} runs have ended; the same command goes on with the others."


def trials(records: dict[int, Record], judged_by: str) -> str:
    """The trials of a sweep, the best first, and the best one's settings for `qtemper train` or `compare`.

    Args:
        records: by the number of the trial.
        judged_by: what their accuracy is measured on.
    """

    def top1(record: Record) -> float:
        tested = [e["test_top1"] for e in record.epochs if e.get("test_top1") is not None]
        return float(tested[-1]) if tested else -math.inf

    order = sorted(records, key=lambda n: (records[n].state != "done", -top1(records[n]), n))
    rows = []
    for number in order:
        r = records[number]
        shown = "" if math.isinf(top1(r)) else f"{top1(r):.2f}"
        epochs = f"{len(r.epochs)} of {r.run.experiment.train.epochs}"
        message = r.outcome.get("message", "") if r.state in ("diverged", "failed") else ""
        rows.append([str(number), r.run.arm.label, shown, epochs, f"{r.state}{': ' if message else ''}{message}"])
    lines = [markdown(["trial", "settings", "top-1", "epochs", ""], rows), "", f"top-1 is of {judged_by}."]
    if order and records[order[0]].state == "done":
        settings = [a for a in records[order[0]].run.arm.assignments if a.partition("=")[0].strip() != "data.held_out"]
        lines.append(f"best: {shlex.join(word for text in settings for word in ('--set', text))}")
    else:
        lines.append("no trial has come to its end.")
    return "\n".join(lines)


def write_trials(records: dict[int, Record], judged_by: str, root: Path) -> None:
    """Write `trials.md`, and `trials.jsonl` with a line for each trial, into the sweep's directory."""
    write_atomically(root / "trials.md", (trials(records, judged_by) + "\n").encode())
    lines = [json.dumps({"trial": number, **record.line()}) + "\n" for number, record in sorted(records.items())]
    write_atomically(root / "trials.jsonl", "".join(lines).encode())


def write(records: list[Record], baseline: str | None, root: Path) -> None:
    """Write `table.md`, `table.json` and, with matplotlib, `figure.png` into the comparison's directory."""
    lines = summarize(records, baseline)
    write_atomically(root / "table.md", (format_table(lines, baseline) + "\n").encode())
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(x).items()} for x in lines]
    write_atomically(
        root / "table.json", (json.dumps({"baseline": baseline, "lines": plain}, indent=2) + "\n").encode()
    )
    if importlib.util.find_spec("matplotlib"):
        _figure(lines, records, root / "figure.png")


def _figure(lines: list[Line], records: list[Record], path: Path) -> None:
    """Every seed as a point, every mean as a bar across them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.35 * len(lines)), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, line in enumerate(lines):
        points = [r.result["top1"] for r in records if r.run.arm.label == line.label and r.state == "done"]
        axes.plot(points, [i] * len(points), "o", color="tab:blue", alpha=0.6)
        if points:
            axes.plot([line.mean], [i], "|", color="black", markersize=16)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
