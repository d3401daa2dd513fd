"""Proof that an ONNX file computes what the integer model computes: codes are counted, not compared with a tolerance.

Two kinds of input: real ones, for the whole model, and for each convolution and linear layer by itself codes at both
ends of their range, where 8-bit kernels saturate. Every number here is about the runtime and the CPU that ran it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from qtemper.environment import cpu_flags
from qtemper.errors import ExportError
from qtemper.export import runtimes
from qtemper.export.bits import shrink
from qtemper.export.operators import ops
from qtemper.export.targets import Target
from qtemper.layers import QuantLayer, StoredWeight

KERNELS = (ops.convolve.default, ops.linear.default, ops.linear_real.default)
OUTPUT = "output"
"""What the model returns, among the layers."""

DISAGREE = "onnxruntime and integer differ"
"""Share of images, among the accuracies."""

UNFUSED_SHARE = 0.05
"""Share of a layer's codes that may differ where nothing here runs a file as its target does: float sums, unfused."""

OUTPUT_TOLERANCE = 1e-3
"""Of the largest number, for outputs that pass through float layers."""

OPENVINO_SHARE = 1e-4
"""Share of positions that OpenVINO, whose convolutions sum in float where it likes, may have off by one code."""


@dataclass(frozen=True)
class Count:
    """Codes of one layer, or numbers that the model returns, that differ from the integer model's.

    Attributes:
        runtime: who ran the file.
        inputs: `real` or `extreme`.
        layer: name of the layer.
        codes: how many were compared.
        wrong: how many differ.
        largest: largest difference, in codes.
        exact: whether they must be equal: codes, and an output that comes straight from integers.
        scale: largest number among what was expected.
    """

    runtime: str
    inputs: str
    layer: str
    codes: int
    wrong: int
    largest: float
    exact: bool = True
    scale: float = 0.0


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        target: name of the target.
        environment: CPU flags and versions.
        counts: for every runtime, kind of input and layer.
        operators: of onnxruntime's optimised graph.
        kernels: quantized convolutions and linear layers, and how many of them run on integers there.
        in_float: layers whose two operands are quantized, and that are a float operator in the file nevertheless.
        sizes: bytes of the file, of the float weights, and of the codes with a scale and a bias for each channel.
        top1: percent, of each way to run the model.
        latency: seconds, medians of the float model and the file, and the ratio with its quartiles.
    """

    target: str
    environment: dict[str, Any]
    counts: list[Count] = field(default_factory=list)
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
            share = {"onnxruntime": 0.0, "openvino": OPENVINO_SHARE}.get(count.runtime)
            if self.target == "tensorrt":
                share = UNFUSED_SHARE
            if share is None:
                continue  # unfused float arithmetic flips single codes, and layers behind amplify that: for information
            off = count.wrong > share * count.codes or (count.runtime == "openvino" and count.largest > 1)
            if not count.exact:
                off = count.largest > OUTPUT_TOLERANCE * count.scale or not np.isfinite(count.largest)
            if off:
                what = "codes" if count.layer != OUTPUT else "numbers"
                where = f"on {count.inputs} input in {count.runtime}"
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
        groups = {(c.runtime, c.inputs) for c in self.counts}
        for runtime, inputs in sorted(groups):
            own = [c for c in self.counts if (c.runtime, c.inputs) == (runtime, inputs) and c.layer != OUTPUT]
            wrong, codes = sum(c.wrong for c in own), sum(c.codes for c in own)
            largest = max((c.largest for c in own), default=0.0)
            lines.append(f"{runtime + ', ' + inputs:36s} {wrong} of {codes} codes wrong, by at most {largest:g}")
        if self.operators:
            lines.append(f"{'integer kernels':36s} {self.kernels[1]} of {self.kernels[0]}")
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


def verify(
    model: onnx.ModelProto,
    integers: fx.GraphModule,
    inputs: Tensor,
    target: Target,
    *,
    reference_inputs: int = 1,
) -> Report:
    """Compare a file's codes with the integer model's.

    Args:
        model: the file, read by onnx.
        integers: what it was made of.
        inputs: real ones, a batch.
        target: what it was made for.
        reference_inputs: how many of them onnx's ReferenceEvaluator gets, which is slow.
    """
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    report = Report(target.name, {"cpu_flags": cpu_flags(), **versions})
    if target.quant_nodes:
        onnx.checker.check_model(model)
        return report
    values = run_integers(integers, inputs)
    names = [name for name in integers.meta["layers"] if name in values]
    known = {name for node in model.graph.node for name in node.output}
    names = [name for name in names if name in known]
    kind = onnx.TensorProto.INT8 if target.signed else onnx.TensorProto.UINT8
    exposed = runtimes.with_outputs(model, names, kind)
    asked = [*names, model.graph.output[0].name]
    values[asked[-1]] = values.pop("")
    labels = integers.meta["layers"] | {asked[-1]: OUTPUT}
    exact_output = any(n.target is ops.linear_real.default for n in _returned(integers))
    with tempfile.TemporaryDirectory() as folder:
        runners = _runners(exposed, asked, target, Path(folder))
        for runtime, run in runners.items():
            x = inputs[:reference_inputs] if runtime == "onnx reference" else inputs
            found = run(x.numpy())
            for name in asked:
                count = _count(runtime, "real", labels[name], found[name], values[name][: len(x)])
                straight = exact_output and runtime == "onnxruntime"
                report.counts.append(replace(count, exact=name != asked[-1] or straight))
        if not target.signed:
            report.counts += _extremes(model, integers, inputs, kind)
            report.operators = runtimes.optimised_operators(model, Path(folder))
            report.kernels = _kernels(integers, report.operators)
    return report


def _returned(integers: fx.GraphModule) -> list[fx.Node]:
    return [node for node in integers.graph.nodes if any(user.op == "output" for user in node.users)]


def _runners(model: onnx.ModelProto, asked: list[str], target: Target, folder: Path) -> dict[str, runtimes.Runner]:
    if target.signed:  # nothing here runs it as TensorRT does; its arithmetic is checked without fusion
        return {"onnxruntime, unoptimised": runtimes.run_onnxruntime(model, asked, optimised=False)}
    found = {
        "onnxruntime": runtimes.run_onnxruntime(model, asked),
        "onnxruntime, unoptimised": runtimes.run_onnxruntime(model, asked, optimised=False),
    }
    if model.opset_import[0].version <= 21 or target.name == "onnxruntime":
        found["onnx reference"] = runtimes.run_reference(model, asked)
    if target.name == "openvino":
        with contextlib.suppress(ModuleNotFoundError):
            found["openvino"] = runtimes.run_openvino(model, asked, folder)
    return found


def run_integers(integers: fx.GraphModule, inputs: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Every node's value by its name, and the model's output under the empty name."""
    found: dict[str, np.ndarray[Any, Any]] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                found[n.name] = result.numpy()
            return result

    with torch.no_grad():
        output = Runner(integers).run(inputs)
    found[""] = first_tensor(output).numpy()
    return found


def first_tensor(output: Any) -> Tensor:
    """The logits of whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return first_tensor(next(iter(values)))


def _count(runtime: str, inputs: str, layer: str, found: Any, expected: Any) -> Count:
    if found.shape != expected.shape:
        raise ExportError(f"{layer}: {runtime} gives the shape {found.shape}, the integer model {expected.shape}.")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    wrong = int((~(a == b)).sum())  # NaN counts
    return Count(runtime, inputs, layer, a.size, wrong, float(np.abs(a - b).max()), scale=float(np.abs(b).max()))


def _extremes(model: onnx.ModelProto, integers: fx.GraphModule, inputs: Tensor, kind: int) -> list[Count]:
    """Each layer by itself, on codes at both ends of their range."""
    counts = []
    values = run_integers(integers, inputs[:2])
    generator = torch.Generator().manual_seed(0)
    final = model.graph.output[0].name
    for node in integers.graph.nodes:
        if node.target not in KERNELS:
            continue
        name = node.name if any(node.name in made.output for made in model.graph.node) else final
        small, _ = runtimes.part(model, name, kind)
        like = torch.from_numpy(values[node.args[0].name])
        low, high = _ends(node.args[0], like)
        random = torch.randint(0, 2, like.shape[1:], generator=generator).bool()
        codes = torch.stack([torch.where(random, high, low), torch.full_like(random, 1).long() * high])
        codes = codes.to(like.dtype)
        arguments = fx.map_arg(node.args, lambda n: getattr(integers, str(n.target)) if n.op == "get_attr" else n)
        expected = node.target(codes, *arguments[1:])
        if small.graph.output[0].name != name:
            raise AssertionError(name)
        found = runtimes.run_onnxruntime(_typed(small, expected), [name])(codes.numpy())[name]
        counts.append(
            _count("onnxruntime", "extreme", integers.meta["layers"].get(node.name, node.name), found, expected.numpy())
        )
    return counts


def _typed(model: onnx.ModelProto, like: Tensor) -> onnx.ModelProto:
    kind = {torch.uint8: onnx.TensorProto.UINT8, torch.int8: onnx.TensorProto.INT8}.get(
        like.dtype, onnx.TensorProto.FLOAT
    )
    model.graph.output[0].type.tensor_type.elem_type = kind
    return model


def _ends(node: fx.Node, like: Tensor) -> tuple[int, int]:
    """Smallest and largest code that a node's grid has."""
    while node.target not in (*KERNELS, ops.quantize.default, ops.add_codes.default, ops.average.default):
        node = node.args[0]  # type: ignore[assignment]
    numbers = node.args[:-1] if node.target is ops.quantize.default else node.args
    return int(numbers[-2]), int(numbers[-1])  # type: ignore[arg-type]


def _kernels(integers: fx.GraphModule, operators: dict[str, int]) -> tuple[int, int]:
    expected = sum(1 for node in integers.graph.nodes if node.target in KERNELS)
    names = ("QLinearConv", "QGemm", "ConvInteger", "MatMulIntegerToFloat", "QLinearMatMul")
    return expected, sum(operators.get(name, 0) for name in names)


def left_in_float(model: nn.Module, integers: fx.GraphModule) -> list[str]:
    """Names of layers with quantized weight and input that no integer operator computes."""
    found = {node.args[3].target for node in integers.graph.nodes if node.target in KERNELS}
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None and layer.act_quantizer is not None
    ]
    return [n for n in layers if not any(str(t).startswith(f"{n.replace('.', '_')}_weight") for t in found)]


def sizes(model: nn.Module, integers: fx.GraphModule, file: int) -> dict[str, int]:
    """Bytes of the file, of the float weights, and the least that codes, scales and biases take."""
    least = 0.0
    for node in integers.graph.nodes:
        if node.target in KERNELS:
            codes = getattr(integers, node.args[3].target)
            least += codes.numel() * shrink(codes.numpy()).bits / 8 + 8 * codes.shape[0]
    floats = 4 * sum(p.numel() for p in model.parameters())
    floats += 4 * sum(m.codes.numel() for m in model.modules() if isinstance(m, StoredWeight))
    return {"file": file, "float weights": floats, "codes, scales, biases": round(least)}


def accuracies(
    batches: Iterable[tuple[Tensor, Tensor]], integers: fx.GraphModule, model: onnx.ModelProto, fake: nn.Module
) -> dict[str, float]:
    """Top-1 in percent of the fake-quantized model, the integer model and the file; and images whose logits differ."""
    output = model.graph.output[0].name
    run = runtimes.run_onnxruntime(model, [output])
    right = {"fake-quantized": 0, "integer": 0, "onnxruntime": 0}
    seen = different = disagree = 0
    with torch.no_grad():
        for x, labels in batches:
            logits = {
                "fake-quantized": first_tensor(fake(x)),
                "integer": first_tensor(integers(x)),
                "onnxruntime": torch.from_numpy(run(x.numpy())[output]),
            }
            for name, values in logits.items():
                right[name] += int((values.argmax(1) == labels).sum())
            disagree += int((logits["integer"].argmax(1) != logits["onnxruntime"].argmax(1)).sum())
            different += int((logits["integer"] != logits["onnxruntime"]).any(1).sum())
            seen += len(labels)
    if not seen:
        return {}
    share = {name: 100 * count / seen for name, count in right.items()}
    return share | {DISAGREE: 100 * disagree / seen, "logits differ": 100 * different / seen}


def compare_latency(
    model: onnx.ModelProto, reference: onnx.ModelProto, x: Tensor, rounds: int = 30
) -> dict[str, float]:
    """Time of the float model and of the file in onnxruntime, taking turns: medians, and the ratio's quartiles."""
    sessions = {"float": runtimes.onnxruntime_session(reference), "file": runtimes.onnxruntime_session(model)}
    times = runtimes.latency(sessions, x.numpy(), rounds)
    ratios = [a / b for a, b in zip(times["float"], times["file"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "float": statistics.median(times["float"]),
        "file": statistics.median(times["file"]),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }
