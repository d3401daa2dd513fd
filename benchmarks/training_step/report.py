"""The table and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.training_step.contestants import CONTESTANTS, REFERENCE
from benchmarks.training_step.setup import Setup
from benchmarks.training_step.statistics import ratios, spread

from qtemper.environment import environment

MIB = 2**20


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ratios to the reference, by contestant; a contestant that failed keeps its reason.

    Raises:
        ValueError: the reference itself failed.
    """
    base = results[REFERENCE]
    if "failure" in base:
        raise ValueError(f"the reference failed: {base['failure']}")
    summary: dict[str, dict[str, Any]] = {}
    for key, result in results.items():
        if "failure" in result:
            summary[key] = {"failure": result["failure"]}
            continue
        summary[key] = {
            "wall": dataclasses.asdict(spread(ratios(_walls(result), _walls(base)))),
            "cpu": dataclasses.asdict(spread(ratios(_cpus(result), _cpus(base)))),
            "milliseconds": dataclasses.asdict(spread([1e3 * seconds for seconds in _walls(result)])),
            "saved": result["saved_bytes"] / base["saved_bytes"],
            "page_faults_per_step": _faults(result),
        }
        if result["peak_step_bytes"] and base["peak_step_bytes"]:
            summary[key]["peak_step"] = result["peak_step_bytes"] / base["peak_step_bytes"]
    return summary


def _walls(result: dict[str, Any]) -> list[float]:
    return [sum(visit["wall"]) / len(visit["wall"]) for visit in result["visits"]]


def _cpus(result: dict[str, Any]) -> list[float]:
    return [visit["cpu"] / len(visit["wall"]) for visit in result["visits"]]


def _faults(result: dict[str, Any]) -> float:
    visits = result["visits"]
    return float(sum(v["page_faults"] for v in visits) / sum(len(v["wall"]) for v in visits))


def table(setup: Setup, results: dict[str, dict[str, Any]], summary: dict[str, dict[str, Any]]) -> str:
    """The measurements as Markdown; times are medians over the rounds with the quartiles."""
    lines = [
        setup.title(),
        "",
        "| | time / float | CPU time / float | ms a step | saved / float | peak / float, MiB | first step s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in summary.items():
        note = f" ({CONTESTANTS[key].note})" if CONTESTANTS[key].note else ""
        if "failure" in row:
            lines.append(f"| {key}{note} | {row['failure']} | | | | | |")
            continue
        result = results[key]
        peak = f"{row['peak_step']:.2f}, {result['peak_step_bytes'] / MIB:.0f}" if "peak_step" in row else ""
        lines.append(
            f"| {key}{note} | {_spread(row['wall'])} | {_spread(row['cpu'])} | {row['milliseconds']['median']:.1f} "
            f"| {row['saved']:.2f} | {peak} | {result['first_step_seconds']:.1f} |"
        )
    return "\n".join(lines)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} [{values['lower']:.2f}, {values['upper']:.2f}]"


def provenance(setup: Setup) -> dict[str, Any]:
    """Where the numbers come from; the load tells whether the machine was idle."""
    here = {"threads": setup.threads, "cores": len(os.sched_getaffinity(0)), "load_at_start": os.getloadavg()[0]}
    return environment(setup.seed) | here


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    """Add runs to the file; one of the same kind and setup takes the old one's place."""
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    fresh = {_identity(run) for run in runs}
    kept = [run for run in old if _identity(run) not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": "python -m benchmarks.training_step", "runs": [*kept, *runs]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _identity(run: dict[str, Any]) -> str:
    return json.dumps([run["kind"], run.get("fast"), run["setup"]], sort_keys=True)
