"""Mean, spread, and the paired difference to a baseline with its confidence interval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from qtemper.compare.record import Record
from qtemper.errors import optional_module

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Line:
    """An arm's statistics over its seeds, in percent top-1.

    Attributes:
        label: the arm.
        count: seeds with a result; a diverged one counts in `diverged` only.
        diverged: seeds that diverged.
        mean: test accuracy; NaN without a result.
        deviation: standard deviation over seeds; NaN below two.
        train_loss: mean training loss of the last epoch.
        pairs: seeds that the arm and the baseline share.
        difference: mean of the paired differences to the baseline; NaN without pairs.
        half_width: half of the difference's 95% interval (Student's t); NaN below two pairs.
    """

    label: str
    count: int
    diverged: int
    mean: float
    deviation: float
    train_loss: float
    pairs: int
    difference: float
    half_width: float

    @property
    def verdict(self) -> str:
        """Whether the difference is one; nothing where the pairs do not say how much they vary."""
        if math.isnan(self.half_width) or self.half_width == 0:
            return ""
        if abs(self.difference) <= self.half_width:
            return "no difference"
        return "better" if self.difference > 0 else "worse"


def summarize(records: list[Record], baseline: str | None) -> list[Line]:
    """A line for each arm, in the grid's order.

    Args:
        records: of all runs.
        baseline: label of the arm to compare with.
    """
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.run.arm.label, []).append(record)
    base = _by_seed(arms.get(baseline, [])) if baseline else {}
    lines = []
    for label, found in arms.items():
        top1 = _by_seed(found)
        losses = [r.epochs[-1]["train_loss"] for r in found if r.state == "done" and r.epochs]
        paired = [top1[seed] - base[seed] for seed in top1 if seed in base] if label != baseline else []
        lines.append(
            Line(
                label,
                len(top1),
                sum(r.state == "diverged" for r in found),
                statistics.fmean(top1.values()) if top1 else math.nan,
                statistics.stdev(top1.values()) if len(top1) > 1 else math.nan,
                statistics.fmean(losses) if losses else math.nan,
                len(paired),
                statistics.fmean(paired) if paired else math.nan,
                _half_width(paired),
            )
        )
    return lines


def _by_seed(records: list[Record]) -> dict[int, float]:
    return {r.run.seed: float(r.result["top1"]) for r in records if r.state == "done"}


def _half_width(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    stats = optional_module("scipy.stats", "compare")
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def format_table(lines: list[Line], baseline: str | None) -> str:
    """The lines as a table in markdown."""
    head = ["", "top-1", "sd", "n", "train loss"]
    if baseline:
        head += [f"against {baseline}", "95% interval", ""]
    rows = []
    for line in lines:
        row = [line.label, _number(line.mean), _number(line.deviation), str(line.count), _number(line.train_loss, 3)]
        if line.diverged:
            row[3] += f" + {line.diverged} diverged"
        if baseline:
            low, high = line.difference - line.half_width, line.difference + line.half_width
            interval = "" if math.isnan(low) else f"{low:+.2f} .. {high:+.2f}"
            if 0 < line.pairs < line.count:
                interval += f" ({line.pairs} pairs)"
            row += ["" if math.isnan(line.difference) else f"{line.difference:+.2f}", interval, line.verdict]
        rows.append(row)
    return markdown(head, rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in markdown, in columns of one width."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    shown = [head, ["-" * max(w, 3) for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in shown)


def _number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
