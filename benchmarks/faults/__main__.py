"""`python -m benchmarks.faults [ROW ...]`: the table on the terminal, as JSON, and in docs/reliability.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch
from benchmarks.faults import rows_damage, rows_disk, rows_kill, rows_processes, rows_refuse  # noqa: F401 (they register their rows)
from benchmarks.faults.table import ROWS, Row, as_markdown, run_row

from qtemper.environment import environment

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def document(rows: list[Row], seconds: float) -> dict[str, object]:
    """What `results/faults.json` holds."""
    return {
        "environment": environment(seed=0) | {"cores": len(os.sched_getaffinity(0))},
        "command": "python -m benchmarks.faults",
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def update_docs(path: Path, rows: list[Row], about: dict[str, object]) -> None:
    """Put the table between the markers of docs/reliability.md."""
    where = about["environment"]
    assert isinstance(where, dict)
    source = (
        f"Measured {where['started'][:10]} by `make faults` in {about['seconds']:.0f} s: qtemper {where['qtemper']} "
        f"({where['commit']}), torch {where['torch']}, Python {where['python']}, {where['cores']} cores, "
        f"{where['platform']}; all in `results/faults.json`."
    )
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n{as_markdown(rows)}\n\n{source}\n{END}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of: {', '.join(ROWS)}; all, and only then the files are written")
    chosen = parser.parse_args().rows or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = run_row(name)
        rows.append(row)
        print(f"  {row.figure} in {row.seconds:.0f} s", file=sys.stderr)
        for failure in row.failures[:10]:
            print(f"  {failure}", file=sys.stderr, flush=True)
    about = document(rows, time.monotonic() - started)
    print(as_markdown(rows))
    if chosen == list(ROWS):
        results = ROOT / "results"
        results.mkdir(exist_ok=True)
        (results / "faults.json").write_text(json.dumps(about, indent=2) + "\n")
        update_docs(ROOT / "docs" / "reliability.md", rows, about)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
