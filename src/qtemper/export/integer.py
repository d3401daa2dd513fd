"""A model as a device computes it, in integers, in plain torch: the oracle for every exported file.

Between a quantizer and the next there is one integer operator (`chains.py`, `operators.py`): int32 sums of products of
codes, an int32 bias at scale `x_scale * w_scale`, and one product that takes the sums to the next quantizer's grid.
Batch norm is in that product and in the bias, so low-bit weights stay what they are; a ReLU is the lower end of the
grid. Where a value has another taker than one quantizer (a residual sum, say), it is kept in 8 bits: its scale is
fitted to a batch, and scales that meet in a sum are whole multiples of the sum's, so that the sum is exact. Whatever is
not quantized stays a float operator between `dequantize` and the next `quantize`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtemper.errors import ExportError
from qtemper.export import operators
from qtemper.export.chains import (
    IDENTITIES,
    PADS,
    POOLS,
    Chain,
    argument,
    destinations,
    find_chains,
    is_activation_mark,
    is_move,
    is_weight_mark,
    layer_of,
    relu_bounds,
)
from qtemper.export.codes import (
    Codes,
    IntegerWeight,
    activation_codes,
    integer_weight,
    require_quantized,
    sound_example,
)
from qtemper.export.fold import check_int8, fold
from qtemper.export.joins import fit_joins
from qtemper.export.trace import run_marked, trace
from qtemper.layers import weight_channel_axis
from qtemper.quantizer import Quantizer

aten = torch.ops.aten
ops = operators.ops


def integer_model(model: nn.Module, example: Tensor, *, signed: bool = False) -> fx.GraphModule:
    """The integer form of a prepared, calibrated model.

    Args:
        model: prepared and calibrated, on any device; it is not changed.
        example: a batch of real inputs, two at least; the scales of 8-bit values between layers are fitted to it.
        signed: int8 codes whose zero is 0 instead of uint8 ones, for devices that want nothing else.

    Returns:
        A module on the CPU that takes batches like `example` and returns what the model returns. Its `meta["layers"]`
        maps the names of nodes with codes to layers.

    Raises:
        ExportError: no quantized layers, a quantized tensor that integers cannot hold, or a model that torch.export
            cannot follow.
    """
    require_quantized(model)
    model, example = copy.deepcopy(model).cpu(), sound_example(example)
    graph = trace(model, example)
    return _Builder(model, graph, example, signed).build()


class _Builder:
    """The new graph, node by node. A value of the old one is a node, and if it is in codes, also their grid."""

    def __init__(self, model: nn.Module, old: fx.GraphModule, example: Tensor, signed: bool) -> None:
        self.model, self.old, self.signed = model, old, signed
        self.chains = find_chains(old.graph)
        self.new, self.root = fx.Graph(), nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}
        self.codes: dict[fx.Node, Codes] = {}
        self.layers: dict[str, str] = {}
        self.grids: dict[fx.Node, Codes] = {}
        joins = {}
        for chain in self.chains.values():
            grid = self._wanted(chain)
            if grid is not None:
                self.grids[chain.tail] = grid
            elif chain.kind != "linear":
                joins[chain.tail] = chain
        seen = run_marked(old, model, example, set(joins))
        self.grids |= fit_joins(joins, seen, signed)

    def build(self) -> fx.GraphModule:
        """Go through the old graph."""
        inside = {chain.tail: chain for chain in self.chains.values()}
        skipped = {node for chain in self.chains.values() for node in self._between(chain) if node is not chain.tail}
        for node in self.old.graph.nodes:
            if node in inside:
                self._emit_chain(inside[node])
            elif node not in skipped:
                self._emit(node)
        self.new.set_codegen(self.old.graph._codegen)  # the model's own way of taking and giving values
        self.new.lint()
        result = fx.GraphModule(self.root, self.new, type(self.model).__name__ + "Integer")
        result.graph.eliminate_dead_code()
        result.recompile()
        result.meta["layers"] = {n.name: self.layers[n.name] for n in result.graph.nodes if n.name in self.layers}
        return result.eval()

    def _between(self, chain: Chain) -> list[fx.Node]:
        nodes = [chain.node]
        while nodes[-1] is not chain.tail:
            nodes.append(next(iter(nodes[-1].users)))
        return nodes

    @functools.cache  # noqa: B019  # the builder lives as long as one call
    def _quantizer(self, mark: fx.Node) -> Quantizer:
        quantizer = self.model.get_submodule(str(mark.args[1]))
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @functools.cache  # noqa: B019
    def _grid(self, mark: fx.Node) -> Codes:
        return activation_codes(layer_of(mark), self._quantizer(mark), signed=self.signed)

    def _weight(self, mark: fx.Node) -> IntegerWeight:
        name = layer_of(mark)
        return integer_weight(name, self.model.get_submodule(name))

    def _wanted(self, chain: Chain) -> Codes | None:
        """The grid that all takers agree on, which are quantizers then."""
        takers = list(destinations(chain.tail))
        if chain.kind == "add" or not takers or not all(is_activation_mark(taker) for taker in takers):
            return None
        grids = {self._grid(taker) for taker in takers}
        return grids.pop() if len(grids) == 1 else None

    def _attribute(self, node: Any) -> Any:
        return functools.reduce(getattr, str(node.target).split("."), self.old)

    # --- emission

    def _call(self, name: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.new.create_node("call_function", target, args, name=name or None)

    def _constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A tensor of the model; an equal one that is there is shared, another gets a name beside it."""
        name = taken = name.replace(".", "_")
        count = 0
        while taken in self.root._buffers:
            present = self.root.get_buffer(taken)
            if present.dtype == tensor.dtype and torch.equal(present, tensor):
                return self.new.get_attr(taken)
            count += 1
            taken = f"{name}_{count}"
        self.root.register_buffer(taken, tensor)
        return self.new.get_attr(taken)

    def _real(self, node: Any) -> Any:
        """A value as a float node."""
        if not isinstance(node, fx.Node):
            return node
        if is_weight_mark(node):
            return self._real_weight(node)
        if node.op == "get_attr" and node not in self.values:
            self.values[node] = self._constant(str(node.target), self._attribute(node).detach().cpu())
        value = self.values[node]
        grid = self.codes.get(node)
        return value if grid is None else self._call("", ops.dequantize.default, (value, grid.scale, grid.zero_point))

    def _real_weight(self, mark: fx.Node) -> fx.Node:
        weight, name = self._weight(mark), layer_of(mark)
        axis = weight_channel_axis(self.model.get_submodule(name))
        check_int8(name, weight.codes)
        codes = self._constant(f"{name}_weight", weight.codes.to(torch.int8))
        scale = self._constant(f"{name}_weight_scale", weight.scale)
        return self._call("", ops.dequantize_weight.default, (codes, scale, axis))

    def _set(self, node: fx.Node, value: fx.Node, grid: Codes | None = None, layer: str = "") -> None:
        self.values[node] = value
        if grid is not None:
            self.codes[node] = grid
            self.layers[value.name] = layer or value.name

    def _emit(self, node: fx.Node) -> None:
        if is_weight_mark(node):
            return  # where it is used
        if is_activation_mark(node):
            self._emit_quantizer(node)
        elif node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
            grid = self.codes.get(node.args[0])  # type: ignore[arg-type]
            bounds = relu_bounds(node)
            if grid is not None and is_move(node):
                self._emit_move(node, grid)
            elif grid is not None and bounds is not None and bounds[0] == 0 and bounds[1] == float("inf"):
                value = self.values[node.args[0]]  # type: ignore[index]
                low = max(grid.low, grid.zero_point)
                self._set(node, self._call("", ops.clamp_codes.default, (value, low, grid.high)), grid)
            else:
                self._copy(node)
        else:
            self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        if node.op != "get_attr":  # these where they are used, if they are
            self.values[node] = self.new.node_copy(node, self._real)

    def _emit_quantizer(self, node: fx.Node) -> None:
        grid, x = self._grid(node), node.args[0]
        assert isinstance(x, fx.Node)
        if self.codes.get(x) == grid:
            self.values[node], self.codes[node] = self.values[x], grid
            return
        layer = layer_of(node)
        args = (self._real(x), grid.scale, grid.zero_point, grid.low, grid.high, grid.signed)
        value = self._call(f"{layer}.input".replace(".", "_"), ops.quantize.default, args)
        self._set(node, value, grid, f"{layer}, input")

    def _emit_move(self, node: fx.Node, grid: Codes) -> None:
        x = self.values[node.args[0]]  # type: ignore[index]
        if node.target in IDENTITIES:
            self.values[node], self.codes[node] = x, grid
            return
        if node.target in PADS:
            value = self._call("", aten.constant_pad_nd.default, (x, node.args[1], grid.zero_point))
        elif node.target in POOLS:
            size = argument(node, 1)
            args = (size, argument(node, 2) or size, argument(node, 3, [0, 0]), argument(node, 4, [1, 1]))
            pairs = tuple([p[0], p[-1]] for p in args)
            value = self._call("", ops.max_pool.default, (x, *pairs, argument(node, 5, False)))
        else:
            # `contiguous` is no operator here, so a view may have to copy.
            target = aten.reshape.default if node.target is aten.view.default else node.target
            value = self._call("", target, (x, *fx.map_arg(node.args[1:], self._real)))
        self._set(node, value, grid)

    def _emit_chain(self, chain: Chain) -> None:
        grid = self.grids.get(chain.tail)
        if chain.kind in ("convolve", "linear"):
            self._emit_kernel(chain, grid)
            return
        assert grid is not None
        name = "add" if chain.kind == "add" else "average"
        args: list[Any] = []
        for operand in chain.node.args[: 2 if chain.kind == "add" else 1]:
            own = self.codes[operand]  # type: ignore[index]
            args += [self.values[operand], own.scale, own.zero_point]  # type: ignore[index]
        low, high = _clamped(chain, grid)
        target = ops.add_codes.default if chain.kind == "add" else ops.average.default
        value = self._call("", target, (*args, grid.scale, grid.zero_point, low, high))
        if chain.node.target is aten.mean.dim and not argument(chain.node, 2, False):
            self.layers[value.name] = name
            value = self._call("", aten.flatten.using_ints, (value, 1))
        self._set(chain.tail, value, grid, name)

    def _emit_kernel(self, chain: Chain, grid: Codes | None) -> None:
        node = chain.node
        x, mark = node.args[0], node.args[1]
        assert isinstance(x, fx.Node) and isinstance(mark, fx.Node)  # noqa: PT018
        name, own = layer_of(mark), self.codes[x]
        bias = argument(node, 2)
        folded = fold(
            name,
            self._weight(mark),
            None if bias is None else self._attribute(bias),
            [[None if a is None else self._attribute(a) for a in n.args[1:5]] + [argument(n, 7)] for n in chain.norms],
            own,
        )
        parts = {
            "weight": folded.codes,
            "weight_scale": folded.scale,
            "bias": folded.bias,
            "bias_scale": folded.bias_scale,
        }
        tensors = [self._constant(f"{name}_{part}", tensor) for part, tensor in parts.items()]
        args: tuple[Any, ...] = (self.values[x], own.scale, own.zero_point, *tensors, self._weight(mark).bits)
        label = name.replace(".", "_")
        if chain.kind == "convolve":
            args += _geometry(name, node, folded.codes)
        if grid is None:
            self._set(chain.tail, self._relu(chain, self._call(label, ops.linear_real.default, args)))
            return
        low, high = _clamped(chain, grid)
        target = ops.convolve.default if chain.kind == "convolve" else ops.linear.default
        value = self._call(label, target, (*args, grid.scale, grid.zero_point, low, high))
        self._set(chain.tail, value, grid, name)

    def _relu(self, chain: Chain, value: fx.Node) -> fx.Node:
        if not chain.clamped:
            return value
        bounds = [None if abs(b) == float("inf") else b for b in (chain.low, chain.high)]
        return self._call("", aten.clamp.default, (value, *bounds))


def _clamped(chain: Chain, grid: Codes) -> tuple[int, int]:
    """Codes that leave a chain with a ReLU."""
    low, high = grid.low, grid.high
    if chain.low > -float("inf"):
        low = max(low, round(chain.low / grid.scale) + grid.zero_point)
    if chain.high < float("inf"):
        high = min(high, round(chain.high / grid.scale) + grid.zero_point)
    return low, max(low, high)


def _geometry(name: str, node: fx.Node, weight: Tensor) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a convolution."""
    dims = weight.dim() - 2
    stride, padding, dilation = argument(node, 3, [1]), argument(node, 4, [0]), argument(node, 5, [1])
    stride, dilation = (list(p) if len(p) == dims else list(p) * dims for p in (stride, dilation))
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise ExportError(
                f"{name}: padding='same' of an even kernel pads unevenly; pad with F.pad in front instead."
            )
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    padding = list(padding) if len(padding) == dims else list(padding) * dims
    return stride, padding, dilation, argument(node, 6, 1)
