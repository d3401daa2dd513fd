"""Who takes part: float, our methods through the public API, textbook LSQ, and other libraries; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from benchmarks.training_step import peers, textbook
from benchmarks.training_step.setup import Setup
from torch import Tensor, nn

import qtemper
from qtemper.methods.ewgs import EWGS
from qtemper.methods.lsq import LSQ
from qtemper.methods.tempering import NoiseTempering
from qtemper.quantizer import Method

REFERENCE = "float"
"""Every ratio is to this contestant: the float network, eager, channels_last, in the setup's precision."""

TOTAL_STEPS = 10 * 390
"""Length of the training that the steps are the start of: ten epochs of CIFAR-10 at batch 128. Few steps are run, so
the temperature of the noise stays near its first value and every measured step is a noisy one."""

COMPILED = "/compiled"


@dataclass
class Subject:
    """A network ready to train.

    Attributes:
        model: what is called on the images, and compiled.
        groups: parameters for the optimizer.
        before_step: called with the number of the step before each one.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    before_step: Callable[[int], None] = lambda step: None


Build = Callable[[Setup, Tensor], Subject]


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Attributes:
        key: its name on the command line and in the JSON file.
        build: makes the network and whatever it needs.
        home: `ours` runs in this environment and knows the fast path; `torch` runs here too; `peer` runs in the
            peers' environment.
        compiled: whether the network goes through `torch.compile`.
        compile_options: for `torch.compile`.
        note: what a reader of the table has to know.
    """

    key: str
    build: Build
    home: Literal["ours", "torch", "peer"]
    compiled: bool = False
    compile_options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def _float(setup: Setup, images: Tensor) -> Subject:
    model = setup.network()
    return Subject(model, [{"params": list(model.parameters())}])


def _ours(method: Callable[[], Method], *, train_input: bool = False) -> Build:
    def build(setup: Setup, images: Tensor) -> Subject:
        model = setup.network()
        policy = qtemper.BitPolicy(setup.weight, setup.activation, setup.first_last)
        chosen = method()
        plan = qtemper.make_plan(model, policy, chosen)
        if train_input:
            plan.set(next(iter(plan)).layer, "activation", trained=True)
        qtemper.prepare(model, chosen, plan, seed=setup.seed)
        qtemper.calibrate(model, [images])
        return Subject(
            model,
            qtemper.param_groups(model, lr=0.01),
            lambda step: qtemper.set_progress(model, (step % TOTAL_STEPS) / TOTAL_STEPS),
        )

    return build


def _converted(convert: Callable[[nn.Module, Setup, Tensor], nn.Module]) -> Build:
    """From a function that turns the float network into a quantized one, calibrated on the images."""

    def build(setup: Setup, images: Tensor) -> Subject:
        model = convert(setup.network(), setup, images)
        with torch.no_grad():
            model(images)  # some libraries create their parameters here: before the optimizer asks for them
        parameters = [p for p in model.parameters() if p.requires_grad]
        return Subject(model, [{"params": parameters}])

    return build


def _on_grid(noise_on: Literal["weights", "both"]) -> Method:
    # On-grid noise moves to a neighbouring code, so codes stay integers. It has no zero mean, which the default rule
    # for the gradient's scaling needs; a fixed delta keeps the scaling itself in the measurement.
    return NoiseTempering(noise="on_grid", noise_on=noise_on, delta_rule="fixed", delta_weight=0.1)


OURS: dict[str, Callable[[], Method]] = {
    "lsq": LSQ,
    "ewgs": lambda: EWGS(rule="hessian"),
    "tempering-weights": lambda: NoiseTempering(noise_on="weights"),
    "tempering-both": lambda: NoiseTempering(noise_on="both"),
    "on-grid-weights": lambda: _on_grid("weights"),
    "on-grid-both": lambda: _on_grid("both"),
}
"""Our methods: without noise, and with noise on the weights or on both tensors."""

HESSIAN = "ewgs"
"""The contestant whose curvature update gets a line of its own."""

CONTESTANTS: dict[str, Contestant] = {}
"""All by key, in the table's order."""


def _add(
    key: str, build: Build, home: Literal["ours", "torch", "peer"], *, compiles: bool = True, note: str = ""
) -> None:
    CONTESTANTS[key] = Contestant(key, build, home, note=note)
    if compiles:
        # A peer's graph may break, as it does for its users; what is ours must be one graph.
        options = {} if home == "peer" else {"fullgraph": True}
        CONTESTANTS[key + COMPILED] = Contestant(key + COMPILED, build, home, True, options, note)


_add(REFERENCE, _float, "torch")
for _key, _method in OURS.items():
    _add(_key, _ours(_method), "ours")
_add("lsq-train-input", _ours(OURS["lsq"], train_input=True), "ours", note="the scale of the images is trained too")
_add("textbook-lsq", _converted(textbook.quantize), "torch")
_add("torch.ao", _converted(peers.torch_ao), "torch", compiles=False, note="fused moving-average fake quantization")
_add("brevitas", _converted(peers.brevitas), "peer", note="learned scales for weights and inputs")
_add("torchao-pt2e", _converted(peers.torchao_pt2e), "peer", note="learnable fake quantization, batch norm folded")
_add("nncf", _converted(peers.nncf), "peer", compiles=False, note="8 bits: it refuses fewer")
_add("aimet", _converted(peers.aimet), "peer", compiles=False, note="left out of `make peers`: needs torchvision")
