"""What a file is worth beside its float model: bytes, accuracy, time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from qtemper.export import runtimes
from qtemper.export.bits import shrink
from qtemper.export.operators import KERNELS
from qtemper.export.report import differ
from qtemper.export.targets import Target
from qtemper.export.verify import stand_ins, tensors_of
from qtemper.layers import QuantLayer, StoredWeight


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
    batches: Iterable[tuple[Tensor, Tensor]],
    trained: nn.Module,
    graph: nn.Module,
    file: onnx.ModelProto,
    target: Target,
) -> dict[str, float]:
    """Top-1 in percent of the trained model, of the file's graph, and of the file by whoever runs it here.

    Also the share of images that each of the others classifies otherwise than the graph.
    """
    base = "quant nodes" if target.quant_nodes else "integer"
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "fake-quantized": lambda x: tensors_of(trained(x))[0],
        base: lambda x: tensors_of(graph(x))[0],
    }
    output = file.graph.output[0].name
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, make in stand_ins(target, Path(folder)).items():
            if name != runtimes.REFERENCE:  # too slow
                run = make(file, [output])
                ways[name] = lambda x, run=run: torch.from_numpy(run(x.numpy())[output])  # type: ignore[misc]
        right, others = dict.fromkeys(ways, 0), dict.fromkeys((n for n in ways if n != base), 0)
        seen = 0
        for batch in batches:
            x, labels = (tensor.cpu() for tensor in batch)
            classes = {name: way(x).argmax(1) for name, way in ways.items()}
            for name, found in classes.items():
                right[name] += int((found == labels).sum())
            for name in others:
                others[name] += int((classes[name] != classes[base]).sum())
            seen += len(labels)
    if not seen:
        return {}
    share = {name: 100 * count / seen for name, count in right.items()}
    return share | {differ(name, base): 100 * count / seen for name, count in others.items()}


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
