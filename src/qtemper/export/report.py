"""What verification found, which of it condemns a file, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

OUTPUT = "output"
"""What the model returns, among the layers."""


def differ(a: str, b: str) -> str:
    """Name, among the accuracies, of the share of images that two classify differently."""
    return f"{a} and {b} differ"


DISAGREE = differ("onnxruntime", "integer")


@dataclass(frozen=True)
class Limit:
    """How far a runtime may be from the integer model before a file is condemned.

    Attributes:
        share: of values that may differ.
        most: largest difference of any, in codes or in the output's own unit.
    """

    share: float
    most: float


EXACT = Limit(0.0, 0.0)
OPENVINO = Limit(1e-4, 1.0)
"""Its convolutions sum in float where it likes."""
UNFUSED = Limit(1e-3, 1.0)
"""One layer by itself in float arithmetic, where nothing here runs a file as its target does."""


@dataclass(frozen=True)
class Count:
    """Codes of one layer, or numbers that the model returns, that differ from the integer model's.

    Attributes:
        runtime: who ran the file.
        inputs: `whole model` on real ones, or `each layer` by itself on real codes and on both ends of their range.
        layer: name of the layer.
        real: whether the values are real numbers, not codes.
        codes: how many were compared.
        wrong: how many differ.
        largest: largest difference, in codes.
        limit: what is allowed; None if the numbers are for information, as those of float sums are, which flip single
            codes that layers behind amplify.
    """

    runtime: str
    inputs: str
    layer: str
    real: bool
    codes: int
    wrong: int
    largest: float
    limit: Limit | None


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        target: name of the target.
        sha256: of the file that it is about.
        environment: CPU flags and versions.
        counts: for every runtime, kind of input and layer.
        not_run: runtimes that failed at the file and do not judge it, with what they said.
        operators: of onnxruntime's optimised graph.
        kernels: quantized convolutions and linear layers, and how many of them run on integers there.
        in_float: layers whose two operands are quantized, and that are a float operator in the file nevertheless.
        sizes: bytes of the file, of the float weights, and of the codes with a scale and a bias for each channel.
        top1: percent, of each way to run the model.
        latency: seconds, medians of the float model and the file, and the ratio with its quartiles.
    """

    target: str
    environment: dict[str, Any]
    sha256: str = ""
    counts: list[Count] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    kernels: tuple[int, int] = (0, 0)
    in_float: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Why the file must not be used; empty if it may."""
        found = []
        for count in self.counts:
            limit = count.limit
            # Negated, so that NaN is off.
            if limit is not None and not (count.wrong <= limit.share * count.codes and count.largest <= limit.most):
                what = "numbers" if count.real else "codes"
                where = f"in {count.runtime}, {count.inputs}"
                found.append(f"{count.layer}: {count.wrong} of {count.codes} {what} wrong {where}")
        if self.operators and self.kernels[1] < self.kernels[0]:
            found.append(f"only {self.kernels[1]} of {self.kernels[0]} quantized layers run on integers")
        if self.top1.get(DISAGREE, 0):
            found.append(f"{self.top1[DISAGREE]:.2f}% of the images are classified otherwise than by the integer model")
        return found

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self) | {"failures": self.failures()}, indent=2) + "\n"

    def table(self) -> str:
        """A summary to read."""
        lines = [f"target {self.target}   CPU {' '.join(self.environment['cpu_flags']) or 'unknown'}"]
        groups = {(c.runtime, c.inputs) for c in self.counts if not c.real}
        for runtime, inputs in sorted(groups):
            own = [c for c in self.counts if (c.runtime, c.inputs) == (runtime, inputs) and not c.real]
            wrong, codes, largest = sum(c.wrong for c in own), sum(c.codes for c in own), max(c.largest for c in own)
            lines.append(f"{runtime + ', ' + inputs:36s} {wrong} of {codes} codes wrong, by at most {largest:g}")
        for c in self.counts:
            if c.inputs == "the trained model":
                lines.append(f"{'output, beside the trained model':36s} differs by at most {c.largest:g}")
        lines += [f"{runtime:36s} not run: {message}" for runtime, message in self.not_run.items()]
        if self.operators:
            none = "" if self.kernels[0] else ": no layer has both its operands quantized"
            lines.append(f"{'integer kernels':36s} {self.kernels[1]} of {self.kernels[0]}{none}")
        if self.in_float:
            lines.append(f"{'quantized layers left in float':36s} {', '.join(self.in_float)}")
        for name, size in self.sizes.items():
            lines.append(f"{name + ', bytes':36s} {size:,}")
        for name, value in self.top1.items():
            lines.append(f"{'top-1, ' + name:36s} {value:.2f}%")
        if self.latency:
            t = self.latency
            lines.append(
                f"{'float / file, time':36s} {t['ratio']:.2f} [{t['ratio_low']:.2f}, {t['ratio_high']:.2f}], "
                f"{1e3 * t['float']:.2f} and {1e3 * t['file']:.2f} ms"
            )
        return "\n".join(lines)
