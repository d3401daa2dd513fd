"""Other libraries' quantization-aware training, through their public API; imported only where they run.

Each function takes the float network and returns a trainable quantized one with the setup's bits on weight and input
of the same layers as ours, per tensor, with learned scales where the library has them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from benchmarks.training_step.layers import QuantizedLayer, Site, replace, sites
from benchmarks.training_step.setup import Setup
from torch import Tensor, nn


def torch_ao(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """Fused fake quantization of torch.ao; its ranges follow a moving average, nothing is learned."""
    import torch.ao.quantization as ao

    def quantizer(codes: tuple[int, int], signed: bool) -> nn.Module:
        kind = (torch.qint8, torch.per_tensor_symmetric) if signed else (torch.quint8, torch.per_tensor_affine)
        made: nn.Module = ao.FusedMovingAvgObsFakeQuantize(
            observer=ao.MovingAverageMinMaxObserver,
            quant_min=codes[0],
            quant_max=codes[1],
            dtype=kind[0],
            qscheme=kind[1],
        ).to(setup.device)
        return made

    for site in sites(model, setup, images):
        pair = quantizer(site.weight_codes(), True), quantizer(site.input_codes(), site.signed)
        replace(model, site.name, QuantizedLayer(site.layer, *pair))
    return model


def brevitas(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """Brevitas' layers, scales as parameters that start from statistics."""
    from brevitas import nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    for site in sites(model, setup, images):
        options: dict[str, Any] = {
            "bias": site.layer.bias is not None,
            "weight_quant": Int8WeightPerTensorFloat,
            "weight_bit_width": site.weight,
            "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
            "input_quant": Int8ActPerTensorFloat if site.signed else Uint8ActPerTensorFloat,
            "input_bit_width": site.activation,
            # By default the first 300 steps take percentiles of every input; a training is longer than that, and one
            # step is enough here, so that the measured steps are its usual ones.
            "input_collect_stats_steps": 1,
        }
        layer = site.layer
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            made = qnn.QuantConv2d(*geometry, layer.dilation, layer.groups, **options)
        else:
            made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        replace(model, site.name, made.to(setup.device))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def torchao_pt2e(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """The export-based flow of torchao with its learnable fake quantization."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    def spec(codes: tuple[int, int], signed: bool) -> Any:
        return QuantizationSpec(
            dtype=torch.int8 if signed else torch.uint8,
            quant_min=codes[0],
            quant_max=codes[1],
            qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
            observer_or_fake_quant_ctr=pt2e.LearnableFakeQuantize.with_args(
                observer=pt2e.MovingAverageMinMaxObserver, use_grad_scaling=True
            ),
        )

    chosen: dict[str, Site] = {site.name: site for site in sites(model, setup, images)}
    operations = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)

    class BySite(Quantizer):  # type: ignore[misc]
        def annotate(self, graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in graph.graph.nodes:
                if node.target not in operations:
                    continue
                path = list(node.meta["nn_module_stack"].values())[-1][0]
                site = chosen.get(path.removeprefix("L['self']").lstrip("."))
                if site is not None:
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={
                            node.args[0]: spec(site.input_codes(), site.signed),
                            node.args[1]: spec(site.weight_codes(), True),
                        },
                        _annotated=True,
                    )
            return graph

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    exported = torch.export.export(model, (images,)).module()
    prepared: nn.Module = prepare_qat_pt2e(exported, BySite())
    pt2e.move_exported_model_to_train(prepared)
    with torch.no_grad():
        prepared(images)  # the scales are made here
    prepared.apply(pt2e.enable_range_learning)
    if not any(isinstance(m, pt2e.LearnableFakeQuantize) for m in prepared.modules()):
        raise RuntimeError("torchao annotated no layer")
    return prepared


def nncf(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """NNCF's quantization, whose ranges train afterwards; 8 bits, its only width."""
    import nncf as library

    prepared: nn.Module = library.quantize(model, library.Dataset([images]), subset_size=1)
    return prepared.train()


def aimet(model: nn.Module, setup: Setup, images: Tensor) -> nn.Module:
    """AIMET's simulation with the setup's bits in every layer."""
    from aimet_torch import QuantizationSimModel

    simulation = QuantizationSimModel(
        model, dummy_input=images, default_output_bw=setup.activation, default_param_bw=setup.weight
    )
    simulation.compute_encodings(functools.partial(_forward, images=images))
    trained: nn.Module = simulation.model
    return trained.train()


def _forward(model: nn.Module, *_: Any, images: Tensor) -> None:
    with torch.no_grad():
        model(images)
