"""`python -m benchmarks.faults.rank FAULT RANK STEP ...`: `qtemper ...`, but after a step one rank meets a fault, once.

FAULT is `kill` (SIGKILL) or `hang` (SIGSTOP). After torchrun's restart nothing happens any more. It is noted
in the file FAULTS_HAPPENED.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from benchmarks.faults.driver import after_steps, signal_self

from qtemper import cli

NUMBERS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}


def main() -> None:
    """Entry point."""
    fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv = ["qtemper", *sys.argv[4:]]
    happen = signal_self(NUMBERS[fault])

    def note_and_happen() -> None:
        Path(os.environ["FAULTS_HAPPENED"]).write_text(fault)
        happen()

    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        after_steps(step, note_and_happen)
    cli.main()


if __name__ == "__main__":
    main()
