"""What runtimes want of a file."""

from __future__ import annotations

from dataclasses import dataclass

from qtemper.errors import ExportError, nearest


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: what `export_onnx` calls it.
        int2: whether it reads INT2 weights (opset 25); INT4 then holds 2 bits otherwise.
        signed: int8 codes whose zero is 0 everywhere, weights of one byte, a float bias; otherwise uint8 codes, and
            weights as small as they go.
        quant_nodes: QONNX's operator `Quant` on float tensors, any width, instead of integers.
        about: one line for a user.
    """

    name: str
    int2: bool = False
    signed: bool = False
    quant_nodes: bool = False
    about: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", int2=True, about="CPUs, 1.22 or newer; checked by running it"),
        Target("openvino", about="Intel CPUs; the same file with INT4 for INT2; checked by running it if installed"),
        Target("tensorrt", signed=True, about="NVIDIA GPUs; symmetric int8; checked by its structure only"),
        Target("qonnx", quant_nodes=True, about="FPGA flows (FINN, hls4ml); any width; checked by its structure only"),
    )
}


def get_target(name: str) -> Target:
    """A target by its name.

    Raises:
        ExportError: there is none of that name.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; {nearest(name, TARGETS)}")
    return TARGETS[name]
