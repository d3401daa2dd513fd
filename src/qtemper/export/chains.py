"""What becomes one integer operator: a convolution, linear layer, sum or average with what follows it elementwise."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qtemper.export.trace import MARK

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
SUMS = (aten.add.Tensor, aten.add_.Tensor, operator.add, operator.iadd)
IDENTITIES = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
)
MOVES = (
    aten.slice.Tensor,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
PADS = (aten.pad.default, aten.constant_pad_nd.default)
POOLS = (aten.max_pool2d.default,)


def argument(node: fx.Node, index: int, default: Any = None) -> Any:
    """A positional argument of an operator's node, or its default."""
    return node.args[index] if len(node.args) > index else default


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves or selects values, or pads with zeros, so that it acts on codes as on reals."""
    if node.target in PADS:
        general = node.target is aten.pad.default
        if general and argument(node, 2, "constant") != "constant":
            return False
        value = argument(node, 3 if general else 2, 0.0)
        return value in (0, None) and all(isinstance(n, int) and n >= 0 for n in argument(node, 1))
    return node.target in MOVES or node.target in POOLS or node.target in IDENTITIES


@dataclass
class Chain:
    """One integer operator to be.

    Attributes:
        kind: `convolve`, `linear`, `add` or `average`.
        node: where it begins.
        norms: batch-norm nodes behind it.
        low: of the values that leave, by a ReLU.
        high: likewise.
        tail: the last node that belongs to it.
    """

    kind: str
    node: fx.Node
    norms: list[fx.Node] = field(default_factory=list)
    low: float = -math.inf
    high: float = math.inf
    tail: fx.Node = None  # type: ignore[assignment]

    def follow(self) -> None:
        """Take in the batch norm and the ReLU that follow, as long as nobody else sees what is between."""
        self.tail = self.node
        while len(self.tail.users) == 1:
            after = next(iter(self.tail.users))
            if after.args[0] is not self.tail:
                return
            if after.target is aten.batch_norm.default and not argument(after, 5):
                if self.kind not in ("convolve", "linear") or self.clamped or not _by_output_channel(self, after):
                    return
                self.norms.append(after)
            elif (bounds := relu_bounds(after)) is not None:
                self.low = min(max(self.low, bounds[0]), bounds[1])
                self.high = max(min(self.high, bounds[1]), bounds[0])
            elif after.target not in IDENTITIES:
                return
            self.tail = after

    @property
    def clamped(self) -> bool:
        """Whether a ReLU belongs to it."""
        return self.low > -math.inf or self.high < math.inf


def _by_output_channel(chain: Chain, norm: fx.Node) -> bool:
    """Whether a batch norm has one gain per output channel, its tensors being the model's own."""
    value = chain.node.meta.get("val")
    matrix = isinstance(value, Tensor) and value.dim() == 2
    own = all(a is None or (isinstance(a, fx.Node) and a.op == "get_attr") for a in norm.args[1:5])
    return own and (chain.kind == "convolve" or matrix)


def relu_bounds(node: fx.Node) -> tuple[float, float] | None:
    """The range that a ReLU-like node clamps to."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if node.target in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return float(argument(node, 1, -1.0)), float(argument(node, 2, 1.0))
    if node.target in (aten.clamp.default, aten.clamp_.default):
        low, high = argument(node, 1), argument(node, 2)
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return None


def is_average(node: fx.Node) -> bool:
    """Whether a node is the mean over all pixels of images."""
    value = argument(node, 0)
    rank = value.meta["val"].dim() if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor) else 0
    if rank != 4:
        return False
    if node.target is aten.mean.dim:
        return sorted(d % rank for d in argument(node, 1)) == [2, 3]
    return node.target is aten.adaptive_avg_pool2d.default and list(argument(node, 1)) == [1, 1]


def is_weight_mark(node: Any) -> bool:
    """Whether a node stands for a quantized weight."""
    return isinstance(node, fx.Node) and node.target is MARK and str(node.args[1]).endswith("weight_quantizer")


def is_activation_mark(node: Any) -> bool:
    """Whether a node stands for a quantized activation."""
    return isinstance(node, fx.Node) and node.target is MARK and not is_weight_mark(node)


def layer_of(mark: fx.Node) -> str:
    """Name of the layer that a quantizer belongs to."""
    return str(mark.args[1]).rpartition(".")[0]


def source(node: Any, stop: Container[fx.Node] = ()) -> Any:
    """Where a value comes from, behind nodes that only move values and are not among `stop`."""
    while isinstance(node, fx.Node) and is_move(node) and node not in stop:
        node = node.args[0]
    return node


def destinations(node: fx.Node) -> Iterator[fx.Node]:
    """Who takes a value, before or behind nodes that only move it."""
    for user in node.users:
        if is_move(user):
            yield from destinations(user)
        else:
            yield user


def find_chains(graph: fx.Graph) -> dict[fx.Node, Chain]:
    """All chains of a marked graph, by their first node."""
    chains: dict[fx.Node, Chain] = {}
    tails: dict[fx.Node, Chain] = {}

    def in_codes(value: Any) -> bool:
        chain = tails.get(source(value, tails))
        return chain is not None and chain.kind != "linear"

    for node in graph.nodes:
        kind = None
        if node.op == "call_function":
            quantized = len(node.args) > 1 and is_weight_mark(node.args[1]) and is_activation_mark(source(node.args[0]))
            bias = argument(node, 2)
            quantized = quantized and (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr"))
            if node.target in CONVOLUTIONS and quantized:
                kind = "convolve"
            elif node.target is aten.linear.default and quantized:
                kind = "linear"
            elif node.target in SUMS and all(in_codes(a) for a in node.args[:2]) and not node.kwargs:
                kind = "add"
            elif is_average(node) and in_codes(node.args[0]):
                kind = "average"
        if kind is not None:
            chains[node] = chain = Chain(kind, node)
            chain.follow()
            tails[chain.tail] = chain
    return chains
