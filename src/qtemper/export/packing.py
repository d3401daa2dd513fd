"""Integer weights in as few bits as a file can hold them, unpacked by standard operators when the runtime loads it.

| codes | stored as | becomes |
|---|---|---|
| 2 bits (where the target knows it), 3 and 4 bits | INT2, INT4 | Cast to int8 |
| 1, 5, 6 and 7 bits | planes of bits, 8 codes a byte | shifted, masked, added up, Cast to int8 |
| 8 bits | uint8, zero point 128 | itself: int8 weights saturate silently on CPUs with AVX2 alone |
| 8 bits, for a target that says `int8` | int8 | itself |

Odd codes (grids without a zero) are stored halved, and a channel may be stored negated; see `bits`.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qtemper.export.bits import planes, shrink

SAFE = 63
"""Largest code of an int8 weight whose products with 8-bit activations add up in 16 bits, as AVX2 kernels do."""


def pack_weights(model: ir.Model, *, int2: bool, int8: bool = False, plain: bool = False) -> None:
    """Replace the int8 weights of a model, in place.

    Args:
        model: weights are initializers that a DequantizeLinear takes.
        int2: whether the target knows INT2 (opset 25).
        int8: whether weights of 8 bits stay int8.
        plain: leave int8 weights as they are.
    """
    done: dict[str, tuple[ir.Value, int]] = {}  # a layer that is used twice has one weight
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.const_value is None or weight.const_value.dtype != ir.DataType.INT8:
            continue
        codes, packer, name = weight.const_value.numpy(), _Packer(model, node, weight), str(weight.name)
        if name not in done:
            done[name] = (weight, 0) if plain else _pack(packer, codes, int2, int8)
        packer.finish(done[name][0], codes.shape, done[name][1])
    kinds = {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    uses_int2 = ir.DataType.INT2 in kinds
    model.graph.opset_imports[""] = 25 if uses_int2 else 21
    model.ir_version = 13 if uses_int2 else 10


def float_biases(model: ir.Model) -> None:
    """Replace int32 biases by the float numbers that they stand for, in place."""
    for node in list(model.graph):
        bias = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if bias is None or bias.const_value is None or bias.const_value.dtype != ir.DataType.INT32:
            continue
        product = node.inputs[1].producer()  # type: ignore[union-attr]
        assert product is not None
        scale = [value.const_value.numpy() for value in product.inputs]  # type: ignore[union-attr]
        real = bias.const_value.numpy().astype(np.float32) * (scale[0] * scale[1])
        value = _Packer(model, node, bias).initializer("_float", real)
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        model.graph.remove(product, safe=True)
        if not bias.uses():
            model.graph.initializers.pop(str(bias.name))


def _pack(packer: _Packer, codes: NDArray[np.int8], int2: bool, int8: bool) -> tuple[ir.Value, int]:
    """The codes as a value of the graph, and their zero point."""
    wide = not int8 and max(int(codes.max()), -int(codes.min()) - 1) > SAFE
    stored = shrink(codes)
    if stored.bits == 8 and int8:
        return packer.weight, 0
    if stored.bits == 8:
        return packer.initializer("_uint8", (codes.astype(np.int16) + 128).astype(np.uint8)), 128
    if stored.bits == 2 and int2:
        value = packer.initializer("_int2", stored.inner.astype(ml_dtypes.int2))
    elif stored.bits in (2, 3, 4):
        value = packer.initializer("_int4", stored.inner.astype(ml_dtypes.int4))
    else:
        value = packer.unpack(planes(stored.inner, stored.bits), stored.bits, codes.shape)
    if stored.bits in (2, 3, 4):
        value = packer.cast(value, ir.DataType.INT8)
    kind: type[np.generic] = np.int8
    if wide:
        value, kind = packer.cast(value, ir.DataType.INT16), np.int16
    if stored.doubled:
        value = packer.call("Add", packer.call("Mul", value, packer.array(kind(2))), packer.array(kind(1)))
    if stored.sign is not None:
        sign = stored.sign.astype(kind).reshape(-1, *[1] * (codes.ndim - 1))
        value = packer.call("Mul", value, packer.array(sign))
    if wide:
        value = packer.cast(packer.call("Add", value, packer.array(np.int16(128))), ir.DataType.UINT8)
    return value, 128 if wide else 0


class _Packer:
    """Writes the nodes in front of one weight's DequantizeLinear."""

    def __init__(self, model: ir.Model, node: ir.Node, weight: ir.Value) -> None:
        self.model, self.node, self.weight = model, node, weight
        self.count = 0

    def initializer(self, suffix: str, array: NDArray[np.generic]) -> ir.Value:
        name = f"{self.weight.name}{suffix}"
        while name in self.model.graph.initializers:
            name += "_"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        assert value.const_value is not None
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        self.model.graph.register_initializer(value)
        return value

    def array(self, array: NDArray[np.generic] | np.generic) -> ir.Value:
        self.count += 1
        return self.initializer(f"_c{self.count}", np.asarray(array))

    def call(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        self.count += 1
        node = ir.node(op_type, inputs=inputs, attributes=attributes or None)
        node.outputs[0].name = f"{self.weight.name}_{self.count}"
        self.model.graph.insert_before(self.node, node)
        return node.outputs[0]

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return self.call("Cast", value, to=int(kind))

    def unpack(self, packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> ir.Value:
        """int8 codes from planes of bits."""
        value = self.initializer("_bits", packed[:, :, None])
        value = self.call("BitShift", value, self.array(np.arange(8, dtype=np.uint8)))
        value.producer().attributes["direction"] = ir.AttrString("direction", "RIGHT")  # type: ignore[union-attr]
        value = self.call("BitwiseAnd", value, self.array(np.uint8(1)))
        value = self.cast(value, ir.DataType.INT32)
        value = self.call("Reshape", value, self.array(np.array([bits, -1], dtype=np.int64)))
        weights = (1 << np.arange(bits, dtype=np.int32))[:, None]
        value = self.call("Mul", value, self.array(weights))
        value = self.call("ReduceSum", value, self.array(np.array([0], dtype=np.int64)), keepdims=0)
        value = self.call("Sub", value, self.array(np.int32(2 ** (bits - 1))))
        size = self.array(np.array([int(np.prod(shape))], dtype=np.int64))
        value = self.call("Slice", value, self.array(np.array([0], dtype=np.int64)), size)
        value = self.call("Reshape", value, self.array(np.array(shape, dtype=np.int64)))
        return self.cast(value, ir.DataType.INT8)

    def finish(self, value: ir.Value, shape: tuple[int, ...], zero_point: int) -> None:
        """Let the DequantizeLinear take the codes, with an explicit zero point, without which nothing is fused."""
        kind = np.uint8 if zero_point else np.int8
        axis = self.node.attributes.get("axis")
        channels = shape[axis.as_int() if axis is not None else 0]
        zeros = self.array(np.full(channels, zero_point, dtype=kind))
        scale = self.node.inputs[1]
        self.node.resize_inputs(3)
        for index, new in enumerate((value, scale, zeros)):
            self.node.replace_input_with(index, new)
        if not self.weight.uses():
            self.model.graph.initializers.pop(str(self.weight.name))
