"""The same file run by different programs: what they give for an input, layer by layer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from qtemper.errors import ExportError

Array = NDArray[Any]
Runner = Callable[[Array], dict[str, Array]]
"""Takes a batch, returns the values that were asked for by name."""


def with_outputs(model: onnx.ModelProto, names: Sequence[str], kind: int) -> onnx.ModelProto:
    """A copy that also returns values between layers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {output.name for output in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(n, kind, None) for n in names if n not in have)
    return copy


def onnxruntime_session(model: onnx.ModelProto, *, optimised: bool = True) -> Any:
    """A session on the CPU, with the default optimisations or none.

    Raises:
        ExportError: onnxruntime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime does not load the file: {error}") from error


def run_onnxruntime(model: onnx.ModelProto, names: Sequence[str], *, optimised: bool = True) -> Runner:
    """Onnxruntime."""
    session = onnxruntime_session(model, optimised=optimised)
    entry = session.get_inputs()[0].name
    return lambda x: dict(zip(names, session.run(list(names), {entry: x}), strict=True))


REFERENCE = "onnx reference"


def run_reference(model: onnx.ModelProto, names: Sequence[str]) -> Runner:
    """Onnx's own ReferenceEvaluator: slow, plain numpy; it is told QONNX's `Quant`."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(
            self, x: Array, scale: Array, zeropt: Array, bitwidth: Array, signed: int = 1, **_: object
        ) -> tuple[Array]:
            low = -(2.0 ** (bitwidth - 1)) if signed else 0.0
            v = np.clip(np.rint(x / scale + zeropt), low, low + 2.0**bitwidth - 1)
            return (((v - zeropt) * scale).astype(np.float32),)

    evaluator = ReferenceEvaluator(model, new_ops=[Quant])
    entry = model.graph.input[0].name

    def run(x: Array) -> dict[str, Array]:
        with np.errstate(all="ignore"):  # some BLAS report operations on values that they then discard
            return dict(zip(names, evaluator.run(list(names), {entry: x}), strict=True))

    return run


def run_openvino(model: onnx.ModelProto, names: Sequence[str], directory: Path) -> Runner:
    """OpenVINO on the CPU.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import openvino

    path = directory / "openvino.onnx"
    onnx.save(model, path)
    # Where a CPU has bf16 that is the default, and what is float between the integers then differs.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Array) -> dict[str, Array]:
        found = compiled(x)
        return {name: np.asarray(found[name]) for name in names}

    return run


def optimised_operators(model: onnx.ModelProto, directory: Path) -> dict[str, int]:
    """How often each operator is in onnxruntime's optimised graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(directory / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def part(model: onnx.ModelProto, output: str, kind: int, shape: Sequence[int], dtype: torch.dtype) -> onnx.ModelProto:
    """The nodes of one layer, from the codes that it takes to a value.

    Args:
        model: the file.
        output: name of the value.
        kind: onnx's type of codes.
        shape: of the codes that it takes.
        dtype: of the value.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted, kept, entry = [output], {}, ""
    while wanted:
        node = made_by.get(wanted.pop())
        if node is None or node.output[0] in kept:
            continue
        kept[node.output[0]] = node
        for position, name in enumerate(node.input):
            is_data = node.op_type == "DequantizeLinear" and position == 0 and not _constant(name, made_by, constants)
            if is_data:
                entry = name
                before = made_by.get(name)
                # A linear layer on sequences reshapes its codes, and the result by the shape that they had.
                if (
                    before is not None
                    and before.op_type == "Reshape"
                    and _constant(before.input[1], made_by, constants)
                ):
                    kept[name], entry = before, before.input[0]
            elif node.op_type != "Shape":
                wanted.append(name)
    nodes = [node for node in model.graph.node if node.output[0] in kept]
    used = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info(entry, kind, shape)],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT if dtype.is_floating_point else kind, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _constant(name: str, made_by: dict[str, onnx.NodeProto], constants: set[str]) -> bool:
    """Whether a value does not depend on the model's input."""
    if name in constants or not name:
        return True
    node = made_by.get(name)
    return node is not None and all(_constant(n, made_by, constants) for n in node.input)


def latency(sessions: dict[str, Any], x: Array, rounds: int = 30) -> dict[str, list[float]]:
    """Seconds of each run of each session, taking turns."""
    entries = {name: session.get_inputs()[0].name for name, session in sessions.items()}
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 3):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {entries[name]: x})
            if turn >= 3:
                found[name].append(time.perf_counter() - start)
    return found
