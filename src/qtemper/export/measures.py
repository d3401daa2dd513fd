"""What a file is worth beside its float model: bytes, accuracy, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import onnx
import torch
from torch import Tensor, fx, nn

from qtemper.export import runtimes
from qtemper.export.bits import shrink
from qtemper.export.operators import KERNELS
from qtemper.export.report import DISAGREE
from qtemper.export.verify import tensors_of
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
    batches: Iterable[tuple[Tensor, Tensor]], integers: fx.GraphModule, model: onnx.ModelProto, fake: nn.Module
) -> dict[str, float]:
    """Top-1 in percent of the fake-quantized model, the integer model and the file; and images whose logits differ."""
    output = model.graph.output[0].name
    run = runtimes.run_onnxruntime(model, [output])
    right = {"fake-quantized": 0, "integer": 0, "onnxruntime": 0}
    seen = different = disagree = 0
    with torch.no_grad():
        for batch in batches:
            x, labels = (tensor.cpu() for tensor in batch)
            logits = {
                "fake-quantized": tensors_of(fake(x))[0],
                "integer": tensors_of(integers(x))[0],
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
