"""Proof that an ONNX file computes what the integer model computes: codes are counted, not compared with a tolerance.

Twice: the whole model on real inputs, and each convolution and linear layer by itself on real codes and on codes at
both ends of their range, where 8-bit kernels saturate. Every number is about the runtime and the CPU that ran it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qtemper.environment import cpu_flags
from qtemper.errors import ExportError
from qtemper.export import runtimes
from qtemper.export.operators import KERNELS, ops
from qtemper.export.report import EXACT, OPENVINO, OUTPUT, UNFUSED, Count, Limit, Report
from qtemper.export.targets import Target
from qtemper.weights import one_line

UNOPTIMISED = "onnxruntime, unoptimised"

LIMITS = {"onnxruntime": EXACT, "openvino": OPENVINO, UNOPTIMISED: UNFUSED}
"""Of one layer by itself."""

INFORMATION: dict[str, Callable[..., runtimes.Runner]] = {
    UNOPTIMISED: partial(runtimes.run_onnxruntime, optimised=False),
    runtimes.REFERENCE: runtimes.run_reference,
}
"""Who also runs a file, whatever it finds: float sums flip codes, which the layers behind amplify."""

FLOAT_TAIL = 1e-3
"""Of the largest number: what an output may differ by that passes through float layers, which sum in another order."""

FLIPPED = 0.05
"""The same for a fake-quantized file, all of whose sums are float ones: a flipped code moves an output, too."""


def verify(
    model: onnx.ModelProto, integers: fx.GraphModule, inputs: Tensor, target: Target, *, reference_inputs: int = 1
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
    values, returned = run_integers(integers, inputs)
    known = {name for node in model.graph.node for name in node.output}
    layers = {n: layer for n, layer in integers.meta.get("layers", {}).items() if n in values and n in known}
    outputs = dict(zip((output.name for output in model.graph.output), returned, strict=True))
    returns = [n for n in tree_leaves(integers.graph.output_node().args) if isinstance(n, fx.Node)]
    made_by = dict(zip(outputs, returns, strict=True))
    asked = [*layers, *(name for name in outputs if name not in layers)]
    kind = onnx.TensorProto.INT8 if target.signed else onnx.TensorProto.UINT8
    exposed = runtimes.with_outputs(model, list(layers), kind)
    with tempfile.TemporaryDirectory() as folder:
        judges = stand_ins(target, Path(folder))
        others = {} if target.quant_nodes or target.signed else INFORMATION
        for runtime, make in {**others, **judges}.items():
            run = make(exposed, asked)
            x = inputs[:reference_inputs] if runtime == runtimes.REFERENCE else inputs
            try:
                found = run(x.numpy())
            except Exception as error:
                if runtime in judges:
                    raise
                report.not_run[runtime] = one_line(str(error))
                continue
            for name in asked:
                expected = (values | outputs)[name][: len(x)]
                limit = _limit(runtime, made_by.get(name), integers, target, expected)
                label = layers.get(name, OUTPUT)
                report.counts.append(_count(runtime, "whole model", label, found[name], expected, limit))
        if not target.quant_nodes:
            names = {node: name for name, node in made_by.items()}
            report.counts += _each_layer(model, integers, values, names, kind, judges)
        if not (target.quant_nodes or target.signed):
            report.operators = runtimes.optimised_operators(model, Path(folder))
            report.kernels = _kernels(integers, report.operators)
    return report


def stand_ins(target: Target, folder: Path) -> dict[str, Callable[..., runtimes.Runner]]:
    """Who runs a target's files here, by name; `folder` is for files that a runtime reads."""
    if target.quant_nodes:
        return {runtimes.REFERENCE: runtimes.run_reference}
    if target.signed:  # nothing here runs it as TensorRT does; its arithmetic is checked without fusion
        return {UNOPTIMISED: partial(runtimes.run_onnxruntime, optimised=False)}
    found: dict[str, Callable[..., runtimes.Runner]] = {"onnxruntime": runtimes.run_onnxruntime}
    if target.name == "openvino" and find_spec("openvino"):
        found["openvino"] = partial(runtimes.run_openvino, directory=folder)
    return found


def _limit(
    runtime: str, output: fx.Node | None, integers: fx.GraphModule, target: Target, expected: Any
) -> Limit | None:
    """What a value of the whole model may differ by; `output` is what makes it if the model returns it."""
    scale = _largest(expected)
    if target.quant_nodes:
        return Limit(1.0, FLIPPED * scale) if output else None
    if not any(node.target in KERNELS for node in integers.graph.nodes):  # float sums alone, from end to end
        return Limit(1.0, FLOAT_TAIL * scale) if output else None
    if runtime == "onnxruntime":
        return Limit(1.0, FLOAT_TAIL * scale) if output and output.target is not ops.linear_real.default else EXACT
    return None


def _count(runtime: str, inputs: str, layer: str, found: Any, expected: Any, limit: Limit | None) -> Count:
    if found.shape != expected.shape:
        raise ExportError(f"{layer}: {runtime} gives the shape {found.shape}, the integer model {expected.shape}.")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    wrong = int((~(a == b)).sum())  # NaN counts
    real = expected.dtype.kind == "f"
    apart = np.subtract(a, b, out=np.zeros_like(a), where=a != b)  # equal infinities are 0 apart
    return Count(runtime, inputs, layer, real, a.size, wrong, float(np.abs(apart).max(initial=0.0)), limit)


def _largest(values: Any) -> float:
    """Of the numbers that are finite: a classifier may rule out a class with -inf."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def against_training(graph: nn.Module, model: nn.Module, inputs: Tensor, *, exact: bool) -> Count:
    """What a file's graph returns, beside the trained model.

    Args:
        graph: made of it.
        model: the trained one.
        inputs: a batch.
        exact: whether all values are float, so that only flipped codes differ; integers keep values in 8 bits that
            training had in float, and only what is not finite is wrong.
    """
    with torch.no_grad():
        found, expected = (tensors_of(m(inputs))[0].numpy() for m in (graph, model))
    most = FLIPPED * _largest(expected) if exact else sys.float_info.max
    return _count("torch", "the trained model", OUTPUT, found, expected, Limit(1.0, most))


def run_integers(integers: fx.GraphModule, inputs: Tensor) -> tuple[dict[str, Any], list[Any]]:
    """Every node's value by its name, as arrays, and what the model returns, in order."""
    found: dict[str, Any] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                found[n.name] = result.numpy()
            return result

    with torch.no_grad():
        output = Runner(integers).run(inputs)
    return found, [tensor.numpy() for tensor in tensors_of(output)]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in whatever a model returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _each_layer(
    model: onnx.ModelProto,
    integers: fx.GraphModule,
    values: dict[str, Any],
    outputs: dict[fx.Node, str],
    kind: int,
    judges: dict[str, Callable[..., runtimes.Runner]],
) -> list[Count]:
    """Each layer by itself, on two batches: real codes, and codes at both ends of their range."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for node in integers.graph.nodes:
        if node.target not in KERNELS:
            continue
        real = torch.from_numpy(values[node.args[0].name][:2])
        low, high = _ends(node.args[0])
        mixed = torch.where(torch.randint(0, 2, real[:1].shape, generator=generator).bool(), high, low)
        codes = torch.cat([mixed.to(real.dtype), torch.full_like(real[:1], high), real])
        constants = fx.map_arg(node.args, lambda n: integers.get_buffer(str(n.target)) if n.op == "get_attr" else n)
        expected = node.target(codes, *constants[1:])
        name = outputs.get(node, node.name)
        alone = runtimes.part(model, name, kind, codes.shape, expected.dtype)
        layer = integers.meta["layers"].get(node.name, node.name)
        for runtime, make in judges.items():
            allowed = LIMITS[runtime]
            if allowed is not EXACT and expected.dtype == torch.float32:  # logits: sums that leave the integers
                allowed = Limit(1.0, FLOAT_TAIL * _largest(expected.numpy()))
            found = make(alone, [name])(codes.numpy())[name]
            counts.append(_count(runtime, "each layer", layer, found, expected.numpy(), allowed))
    return counts


def _ends(node: fx.Node) -> tuple[int, int]:
    """Smallest and largest code that a node's grid has."""
    while node.target not in (*KERNELS, ops.quantize.default, ops.add_codes.default, ops.average.default):
        node = node.args[0]  # type: ignore[assignment]
    numbers = node.args[:-1] if node.target is ops.quantize.default else node.args
    return int(numbers[-2]), int(numbers[-1])  # type: ignore[arg-type]


def _kernels(integers: fx.GraphModule, operators: dict[str, int]) -> tuple[int, int]:
    expected = sum(1 for node in integers.graph.nodes if node.target in KERNELS)
    return expected, operators.get("QLinearConv", 0) + operators.get("QGemm", 0)
