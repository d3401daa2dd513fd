"""`python -m benchmarks.faults.rank FAULT RANK STEP ...`: `qtemper ...`, but after a step one rank meets a fault, once.

FAULT is `kill` (SIGKILL), `hang` (SIGSTOP) or `none`. After torchrun's restart nothing happens any more.
"""

from __future__ import annotations

import os
import signal
import sys

from benchmarks.faults.driver import after_steps, signal_self

from qtemper import cli

NUMBERS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}


def main() -> None:
    """Entry point."""
    fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv = ["qtemper", *sys.argv[4:]]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and fault in NUMBERS:
        after_steps(step, signal_self(NUMBERS[fault]))
    cli.main()


if __name__ == "__main__":
    main()
