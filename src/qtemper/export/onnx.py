"""The integer model as standard ONNX: QuantizeLinear and DequantizeLinear around float operators, which runtimes fuse.

torch.onnx.export translates the graph of `integer.py`; the table here says what each of its operators becomes, so that
a runtime's fused kernel computes what `operators.py` does. What is measured of runtimes, and why the graph looks as it
does, is in docs/decisions/0011.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript import opset21 as op
from onnxscript.optimizer import fold_constants
from onnxscript.values import Op, Opset
from torch import Tensor, fx, nn

from qtemper.errors import ExportError
from qtemper.export import operators
from qtemper.export.integer import integer_model
from qtemper.export.packing import float_biases, pack_weights
from qtemper.export.qonnx import quant_model
from qtemper.export.targets import Target, get_target
from qtemper.export.trace import ANY_BATCH
from qtemper.files import write_atomically
from qtemper.weights import one_line

ops = operators.ops

QONNX_DOMAIN = "qonnx.custom_op.general"


def _number(value: int, signed: bool) -> Any:
    kind = onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
    return op.Constant(value=onnx.helper.make_tensor("", kind, [], [value]))


def _float(value: float) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [value]))


def _signed(x: Any) -> bool:
    return bool(x.dtype == ir.DataType.INT8)


def _quantized(y: Any, signed: bool, scale: float, zero_point: int, low: int, high: int) -> Any:
    """Codes of a float value.

    uint8 codes are cut to the grid's range by an integer Clip behind QuantizeLinear, since a float one stops the fusion
    in onnxruntime; int8 ones by a float Clip in front of it, since TensorRT knows no other.
    """
    narrow = (low, high) != ((-128, 127) if signed else (0, 255))
    if narrow and signed:
        y = op.Clip(y, _float((low - zero_point) * scale), _float((high - zero_point) * scale))
    q = op.QuantizeLinear(y, _float(scale), _number(zero_point, signed))
    if narrow and not signed:
        q = op.Clip(q, _number(low, False), _number(high, False))
    return q


def _real(x: Any, scale: float, zero_point: int, *, signed: bool | None = None) -> Any:
    kind = _signed(x) if signed is None else signed
    return op.DequantizeLinear(x, _float(scale), _number(zero_point, kind))


def _bias(bias: Any, weight_scale: Any, x_scale: float) -> Any:
    """A real bias; runtimes fold the product of the scales, which a file need not hold."""
    return op.DequantizeLinear(bias, op.Mul(weight_scale, _float(x_scale)), axis=0)


def _gemm(x: Any, x_scale: float, x_zero_point: int, weight: Any, weight_scale: Any, bias: Any) -> Any:
    """Of any rank: Gemm wants matrices, and only Gemm takes an int32 bias into the integer kernel."""
    matrix = len(x.shape) == 2
    rows = x if matrix else op.Reshape(x, _integers([-1, int(x.shape[-1])]))
    real = _real(rows, x_scale, x_zero_point, signed=_signed(x))
    reals = op.DequantizeLinear(weight, weight_scale, axis=0)
    y = op.Gemm(real, reals, _bias(bias, weight_scale, x_scale), transB=1)
    if matrix:
        return y
    outer = op.Shape(x, start=0, end=len(x.shape) - 1)
    return op.Reshape(y, op.Concat(outer, _integers([int(weight.shape[0])]), axis=0))


def _integers(values: list[int]) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values))


# What each operator becomes; torch.onnx reads the annotations, and leaves tensors without one.


def _quantize(x, scale: float, zero_point: int, low: int, high: int, signed: bool):  # type: ignore[no-untyped-def]
    return _quantized(x, signed, scale, zero_point, low, high)


def _dequantize(x, x_scale: float, x_zero_point: int):  # type: ignore[no-untyped-def]
    if _signed(x):
        return _real(x, x_scale, x_zero_point)
    # A DequantizeLinear here would let onnxruntime quantize the float operator behind it, weights and all.
    return op.Mul(op.Sub(op.Cast(x, to=onnx.TensorProto.FLOAT), _float(float(x_zero_point))), _float(x_scale))


def _dequantize_weight(weight, weight_scale, axis: int):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(weight, weight_scale, axis=axis)


def _convolve(  # type: ignore[no-untyped-def]
    x, x_scale: float, x_zero_point: int, weight, weight_scale, bias, bias_scale, bits: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    scale: float, zero_point: int, low: int, high: int,
):  # fmt: skip
    y = op.Conv(
        _real(x, x_scale, x_zero_point),
        op.DequantizeLinear(weight, weight_scale, axis=0),
        _bias(bias, weight_scale, x_scale),
        strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=groups,
    )  # fmt: skip
    return _quantized(y, _signed(x), scale, zero_point, low, high)


def _linear(  # type: ignore[no-untyped-def]
    x, x_scale: float, x_zero_point: int, weight, weight_scale, bias, bias_scale, bits: int,
    scale: float, zero_point: int, low: int, high: int,
):  # fmt: skip
    y = _gemm(x, x_scale, x_zero_point, weight, weight_scale, bias)
    return _quantized(y, _signed(x), scale, zero_point, low, high)


def _linear_real(x, x_scale: float, x_zero_point: int, weight, weight_scale, bias, bias_scale, bits: int):  # type: ignore[no-untyped-def]
    return _gemm(x, x_scale, x_zero_point, weight, weight_scale, bias)


def _add(  # type: ignore[no-untyped-def]
    x, x_scale: float, x_zero_point: int, y, y_scale: float, y_zero_point: int,
    scale: float, zero_point: int, low: int, high: int,
):  # fmt: skip
    total = op.Add(_real(x, x_scale, x_zero_point), _real(y, y_scale, y_zero_point))
    return _quantized(total, _signed(x), scale, zero_point, low, high)


def _average(x, x_scale: float, x_zero_point: int, scale: float, zero_point: int, low: int, high: int):  # type: ignore[no-untyped-def]
    mean = op.GlobalAveragePool(_real(x, x_scale, x_zero_point))
    return _quantized(mean, _signed(x), scale, zero_point, low, high)


def _max_pool(  # type: ignore[no-untyped-def]
    x, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool
):
    y, _ = op.MaxPool(
        x, kernel_shape=list(kernel), strides=list(stride), pads=[*padding, *padding], dilations=list(dilation),
        ceil_mode=int(ceil_mode),
    )  # fmt: skip
    return y


def _clamp(x, low: int, high: int):  # type: ignore[no-untyped-def]
    return op.Clip(x, _number(low, _signed(x)), _number(high, _signed(x)))


def _quant(x, scale, zero_point: float, bits: int, signed: bool):  # type: ignore[no-untyped-def]
    """QONNX's."""
    node: Any = Op(Opset(QONNX_DOMAIN, 1), "Quant", _quant_schema())
    return node(x, scale, _float(zero_point), _float(float(bits)), signed=int(signed), narrow=0, rounding_mode="ROUND")


def _quant_schema() -> Any:
    schema = onnx.defs.OpSchema
    inputs = [schema.FormalParameter(name, "T") for name in ("X", "scale", "zeropt", "bitwidth")]
    kinds = {"signed": schema.AttrType.INT, "narrow": schema.AttrType.INT, "rounding_mode": schema.AttrType.STRING}
    return schema(
        "Quant", QONNX_DOMAIN, 1, inputs=inputs, outputs=[schema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema.Attribute(name, kind, required=False) for name, kind in kinds.items()],
    )  # fmt: skip


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    ops.quantize.default: _quantize,
    ops.dequantize.default: _dequantize,
    ops.dequantize_weight.default: _dequantize_weight,
    ops.convolve.default: _convolve,
    ops.linear.default: _linear,
    ops.linear_real.default: _linear_real,
    ops.add_codes.default: _add,
    ops.average.default: _average,
    ops.max_pool.default: _max_pool,
    ops.clamp_codes.default: _clamp,
    ops.quant.default: _quant,
}
"""What each operator of an integer model is in ONNX."""


def to_onnx(integers: fx.GraphModule, example: Tensor) -> ir.Model:
    """An integer model in ONNX, weights still one byte a code; values are named after the integer model's nodes.

    Args:
        integers: from `integer_model`.
        example: a batch, two inputs at least; other batch sizes fit the file too.

    Raises:
        ExportError: a float operator of the model that torch.onnx cannot translate.
    """
    noise = logging.getLogger("torch.onnx")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about torch
            traced = torch.export.export(integers, (example,), dynamic_shapes=ANY_BATCH, strict=False)
            program = torch.onnx.export(
                traced, dynamo=True, optimize=False, verbose=False, opset_version=21,
                custom_translation_table=TRANSLATIONS,
            )  # fmt: skip
    except Exception as error:  # torch.onnx raises many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:  # the last one says what is wrong, the others where
            cause = cause.__cause__
        raise ExportError(f"torch.onnx cannot translate the model: {one_line(str(cause) or repr(cause))}") from error
    finally:
        noise.setLevel(level)
    assert program is not None
    model = program.model
    _rename(model, integers.graph, traced.graph)
    fold_constants(model, onnx_shape_inference=False, should_fold=lambda node: node.op_type not in _KEPT)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # a stack trace for each node, larger than the weights
    return model


_KEPT = ("DequantizeLinear", "QuantizeLinear", "Quant", "Mul")
"""Operators on constants that stay: weights and scales as they are, not as float numbers."""


def build_onnx(integers: fx.GraphModule, example: Tensor, target: Target) -> ir.Model:
    """`to_onnx`, with weights as the target takes them."""
    model = to_onnx(integers, example)
    names = [output.name for output in model.graph.outputs]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ExportError(f"the model returns {', '.join(twice)} twice, which ONNX has no names for; return it once.")
    if target.quant_nodes:
        return model
    if target.signed:
        _require_positive_scales(integers)
        float_biases(model)
    pack_weights(model, int2=target.int2, int8=target.int8, plain=target.signed)
    _slim(model)
    return model


def _slim(model: ir.Model) -> None:
    """Drop what no runtime needs: a W2 ResNet-18 has 60 kB of repeated constants, names, and types between nodes."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if value not in outputs:
                value.type = value.shape = None


def graph_for(model: nn.Module, example: Tensor, target: Target) -> fx.GraphModule:
    """What a target is given: the integer model, or for QONNX the fake-quantized one."""
    if target.quant_nodes:
        return quant_model(model, example)
    return integer_model(model, example, signed=target.signed)


def export_onnx(model: nn.Module, example: Tensor, path: Path, *, target: str = "onnxruntime") -> None:
    """Write a prepared, calibrated and trained model (or a converted one) as ONNX.

    `verify.verify` proves what the file computes; the command `qtemper export` always does.

    Args:
        model: on any device; not changed.
        example: a batch of real inputs, two at least; scales of 8-bit values between layers are fitted to it. The file
            takes any batch size.
        path: of the file; an existing one is replaced, in one step.
        target: a name of `targets.TARGETS`.

    Raises:
        ExportError: the target cannot hold the model; the message names the layer.
    """
    wanted, example = get_target(target), example.cpu()
    onnx_model = build_onnx(graph_for(model, example, wanted), example, wanted)
    write_atomically(path, ir.serde.serialize_model(onnx_model).SerializeToString())


def _require_positive_scales(integers: fx.GraphModule) -> None:
    for node in integers.graph.nodes:
        if node.target in operators.KERNELS and (integers.get_buffer(node.args[4].target) <= 0).any():
            layer = integers.meta["layers"].get(node.name, node.name)
            raise ExportError(
                f"{layer}: batch norm turns the sign of a channel whose 8-bit weight holds -128, and TensorRT takes no "
                "negative scale; train the layer with 7-bit weights."
            )


def _rename(model: ir.Model, ours: fx.Graph, traced: fx.Graph) -> None:
    """Give values the names of our nodes, which are those of layers; torch.export has made up its own."""
    mine, theirs = ([n for n in g.nodes if n.target in TRANSLATIONS] for g in (ours, traced))
    assert [n.target for n in mine] == [n.target for n in theirs]
    names = {there.name: here.name for here, there in zip(mine, theirs, strict=True)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.name = names.pop(value.name)
    assert not names, f"torch.onnx has renamed {sorted(names)}"
