"""QONNX: every quantizer is one `Quant` node on float tensors, whose levels any width and any zero point can have.

Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", arXiv 2206.07527. Its formula,
`(clip(round(x / scale + zeropt)) - zeropt) * scale`, is that of our grids, mid-rise ones included.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qtemper.export.chains import is_weight_mark, layer_of
from qtemper.export.codes import activation_codes, integer_weight
from qtemper.export.operators import ops
from qtemper.export.trace import MARK, trace
from qtemper.layers import StoredWeight, weight_channel_axis
from qtemper.quantizer import Quantizer


def quant_model(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The fake-quantized model as a graph of torch's operators and `quant`.

    Raises:
        ExportError: a quantizer whose levels are no multiples of a step.
    """
    graph = trace(model, example)
    for node in list(graph.graph.nodes):
        if node.target is not MARK:
            continue
        quantizer, layer = model.get_submodule(str(node.args[1])), layer_of(node)
        if is_weight_mark(node):
            owner = model.get_submodule(layer)
            weight = integer_weight(layer, owner)
            shape = [1] * weight.codes.dim()
            shape[weight_channel_axis(owner)] = -1
            scale, bits, signed, zero_point = weight.scale.reshape(shape), weight.bits, True, 0.0
            if isinstance(quantizer, Quantizer):
                zero_point = quantizer.grid.codes.zero_point
            elif isinstance(quantizer, StoredWeight) and bool((weight.codes % 2 != 0).all()) and weight.bits > 1:
                zero_point = -0.5
            scale = scale * 2 if zero_point else scale
        else:
            assert isinstance(quantizer, Quantizer)
            codes, bits = activation_codes(layer, quantizer, signed=quantizer.spec.bits < 8), quantizer.spec.bits
            scale, zero_point = torch.tensor([codes.scale]), 0.0
            signed = quantizer.grid.codes.qmin < 0
        name = str(node.args[1]).replace(".", "_") + "_scale"
        graph.register_buffer(name, scale.float())
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
            new = graph.graph.call_function(ops.quant.default, (node.args[0], constant, zero_point, bits, signed))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
