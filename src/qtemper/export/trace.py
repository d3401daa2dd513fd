"""A prepared model as a graph of torch's operators in which every quantizer is one node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtemper.errors import ExportError
from qtemper.fast import fast_path, use_fast_path
from qtemper.layers import StoredWeight
from qtemper.modes import eval_mode
from qtemper.quantizer import Quantizer


@torch.library.custom_op("qtemper::quantizer", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """Where a quantizer stands."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


MARK = torch.ops.qtemper.quantizer.default


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a prepared model in eval mode; quantizers are nodes `qtemper::quantizer(x, name)`.

    Args:
        model: prepared and calibrated; its mode is kept.
        example: a batch of at least two inputs; other batch sizes fit the graph too.

    Raises:
        ExportError: torch.export cannot follow the model.
    """
    if len(example) < 2:
        raise ExportError("the example is a batch of one, to which torch.export would fix the model; give two or more.")
    enabled = fast_path()
    use_fast_path(False)
    try:
        with eval_mode(model), _marked(model), torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_batch(example), strict=False)
    except Exception as error:  # torch.export raises many kinds
        first = str(error).strip().splitlines()
        raise ExportError(
            f"torch.export cannot follow the model ({first[0] if first else type(error).__name__}); see its "
            "documentation on data-dependent control flow."
        ) from error
    finally:
        use_fast_path(enabled)
    sizes = [n.meta["val"].shape[0] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    if any(isinstance(size, int) for size in sizes):
        raise ExportError(f"the model's forward fixes the batch to {sizes[0]} (a view with a number?); use x.shape[0].")
    graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):  # checks of the input's shape, which the next model makes for itself
        if node.op == "call_module" and node.name.startswith("_guards"):
            graph.graph.erase_node(node)
    return graph


def run_marked(graph: fx.GraphModule, model: nn.Module, example: Tensor, watch: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """Run the fake-quantized model in eval mode by its graph; returns what the watched nodes gave."""
    found: dict[fx.Node, Tensor] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in watch:
                found[n] = result
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
    mode = quantizer.training
    try:
        return quantizer.eval().quantize(x)[0]
    finally:
        quantizer.train(mode)


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


def _dynamic_batch(example: Tensor) -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim.AUTO},)
