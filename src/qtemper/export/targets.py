"""What runtimes want of a file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from qtemper.errors import ExportError, nearest


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: what `export_onnx` calls it.
        int2: whether it reads INT2 weights (opset 25); INT4 then holds 2 bits otherwise.
        signed: int8 codes whose zero is 0 everywhere, weights of one byte, a float bias; otherwise uint8 codes, and
            weights as small as they go.
        int8: weights of 8 bits are int8, which CPUs with AVX2 alone saturate and others compute fastest; otherwise
            uint8 with zero point 128, exact everywhere.
        quant_nodes: QONNX's operator `Quant` on float tensors, any width, instead of integers.
    """

    name: str
    int2: bool = False
    signed: bool = False
    int8: bool = False
    quant_nodes: bool = False


def _reads_int2() -> bool:
    """Whether the onnxruntime that is installed does: 1.24 was the first, and the last for Python 3.10 is 1.23."""
    try:
        installed = version("onnxruntime")
    except PackageNotFoundError:
        return True
    return tuple(int(part) for part in installed.split(".")[:2]) >= (1, 24)


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", int2=_reads_int2()),
        Target("onnxruntime-int8", int2=_reads_int2(), int8=True),
        Target("openvino"),
        Target("tensorrt", signed=True),
        Target("qonnx", quant_nodes=True),
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
