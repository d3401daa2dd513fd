"""QONNX: every quantizer is one `Quant` node on float tensors, whose levels any width and any zero point can have.

Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", arXiv 2206.07527. Its formula,
`(clip(round(x / scale + zeropt)) - zeropt) * scale`, is that of our grids, mid-rise ones included.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from qtemper.export.chains import is_weight_mark, layer_of
from qtemper.export.codes import activation_codes, integer_weight, require_quantized, sound_example
from qtemper.export.operators import ops
from qtemper.export.trace import MARK, trace
from qtemper.layers import weight_channel_axis
from qtemper.quantizer import Quantizer


def quant_model(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The fake-quantized model as a graph of torch's operators and `quant`.

    Raises:
        ExportError: no quantized layers, or a quantizer whose levels are no multiples of a step.
    """
    require_quantized(model)
    model, example = copy.deepcopy(model).cpu(), sound_example(example)
    graph = trace(model, example)
    marks = [node for node in graph.graph.nodes if node.target is MARK]
    for index, node in enumerate(marks):
        layer = layer_of(node)
        owner = model.get_submodule(layer)
        if is_weight_mark(node):
            weight = integer_weight(layer, owner)
            # Odd codes are those of levels without a zero, doubled; a plain grid's that happen to be odd fit that, too.
            doubled = bool((weight.codes % 2 != 0).all())
            shape = [1] * weight.codes.dim()
            shape[weight_channel_axis(owner)] = -1
            step = weight.scale.reshape(shape)
            # The weight's own levels, not the latent weight: a method may quantize a function of it.
            value = _constant(graph, node, f"quant_weight_{index}", weight.codes * step)
            scale, zero_point, bits, signed = step * (2 if doubled else 1), -0.5 if doubled else 0.0, weight.bits, True
        else:
            quantizer = model.get_submodule(str(node.args[1]))
            assert isinstance(quantizer, Quantizer)
            codes = activation_codes(layer, quantizer)
            value, scale = node.args[0], torch.tensor([codes.scale])
            zero_point, bits, signed = 0.0, quantizer.spec.bits, codes.low < codes.zero_point
        constant = _constant(graph, node, f"quant_scale_{index}", scale)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(ops.quant.default, (value, constant, zero_point, bits, signed))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _constant(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    graph.register_buffer(name, value.float())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)
