"""A prepared model as a graph of torch's operators in which every quantizer is one node."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qtemper.errors import ExportError
from qtemper.fast import fast_path, use_fast_path
from qtemper.layers import StoredWeight
from qtemper.modes import eval_mode
from qtemper.quantizer import Quantizer
from qtemper.weights import one_line


@torch.library.custom_op("qtemper::quantizer", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """Where a quantizer stands."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


MARK = torch.ops.qtemper.quantizer.default

ANY_BATCH = ({0: torch.export.Dim.AUTO},)
"""Shapes for torch.export: the first dimension of the one input is free."""


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a prepared model in eval mode; quantizers are nodes `qtemper::quantizer(x, name)`.

    Args:
        model: prepared and calibrated; its mode is kept.
        example: a batch of at least two inputs; other batch sizes fit the graph too.

    Raises:
        ExportError: the model does not run on the example, or torch.export cannot follow it.
        NotCalibratedError: a quantizer has no scale yet.
    """
    if example.dim() == 0 or len(example) < 2:
        raise ExportError("torch.export would fix the model to an example of fewer than two inputs; give a batch.")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ExportError(f"the model is a {type(model).__name__}; export what it wraps, model.{inside}.")
    enabled = fast_path()
    use_fast_path(False)
    try:
        with eval_mode(model), _marked(model), torch.no_grad():
            program = _export(model, example)
    finally:
        use_fast_path(enabled)
    sizes = [n.meta["val"].shape[0] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    if any(is_concrete_int(size) for size in sizes):
        raise ExportError(f"the model's forward fixes the batch to {sizes[0]} (a view with a number?); use x.shape[0].")
    graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):  # checks of the input's shape, which the next model makes for itself
        if node.op == "call_module" and node.name.startswith("_guards"):
            graph.graph.erase_node(node)
    _refuse_changed_views(graph.graph)
    return graph


def _export(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    try:
        model(example)
    except Exception as error:
        raise ExportError(f"the model does not run on the example: {one_line(str(error))}") from error
    try:
        return torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH, strict=False)
    except Exception as error:  # torch.export raises many kinds
        first = str(error).strip().splitlines()
        raise ExportError(
            f"torch.export cannot follow the model ({first[0] if first else type(error).__name__}); see its "
            "documentation on data-dependent control flow."
        ) from error


def _refuse_changed_views(graph: fx.Graph) -> None:
    """Whether a tensor is changed in place that another name of its memory still shows: our values have one name."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    base = {node: _viewed(node) for node in graph.nodes}

    def names(node: fx.Node) -> Iterator[fx.Node]:
        """The node and what it is a view of, back to the memory's first name."""
        current: fx.Node | None = node
        while current is not None:
            yield current
            current = base[current]

    for change in graph.nodes:
        mutable = isinstance(change.target, torch._ops.OpOverload) and change.target._schema.is_mutable
        if not mutable or not isinstance(change.args[0], fx.Node):
            continue
        *_, memory = names(change.args[0])
        for other in graph.nodes:
            line = list(names(other))
            later = any(order[user] > order[change] for user in other.users)
            if later and line[-1] is memory and change not in line and other is not change.args[0]:
                where = str(change.meta.get("stack_trace") or change).strip().splitlines()[-1].strip()
                raise ExportError(
                    f"the model changes a view of a tensor in place ({where}) and uses the tensor afterwards, which "
                    "export cannot follow; write it out of place."
                )


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory a node shows."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        origin = source.args[0] if source.args and isinstance(source.args[0], fx.Node) else source
        return source if _share_memory(node, origin) else None
    if node.target is torch.ops.aten.dropout.default:  # its input itself in eval mode, which its schema does not say
        return source
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    may = any(value.alias_info is not None for value in schema.returns)
    return source if may and (schema.is_mutable or _share_memory(node, source)) else None


def _share_memory(node: fx.Node, source: fx.Node) -> bool:
    """Whether they did while tracing; `reshape`, for one, may have copied."""
    a, b = node.meta.get("val"), source.meta.get("val")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def run_marked(graph: fx.GraphModule, model: nn.Module, example: Tensor, watch: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """Run the fake-quantized model in eval mode by its graph; returns what the watched nodes gave."""
    found: dict[fx.Node, Tensor] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in watch:
                found[n] = result.clone()  # before an operator in place changes it
            return result

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is MARK:
                return _hard(model.get_submodule(args[1]), args[0])
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Runner(graph).run(example)
    return found


def _hard(quantizer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(quantizer, Quantizer):
        return x  # a stored weight's values
    with eval_mode(quantizer):
        return quantizer.quantize(x)[0]


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    changed: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, StoredWeight):
            changed.append(module)
            module.forward = partial(_stored, module, name)  # type: ignore[method-assign]
        elif isinstance(module, Quantizer):
            module.require_calibrated()
            if module.enabled:
                changed.append(module)
                module.forward = partial(mark, name=name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _stored(weight: StoredWeight, name: str) -> Tensor:
    marked: Tensor = mark(type(weight).forward(weight), name)
    return marked
