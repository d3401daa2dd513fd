"""Leaves: one operator to Dynamo, the operations inside to what is behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qtemper
from qtemper import functional as F
from qtemper import leaf

LIMITS = F.code_range(4, "signed")


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    v = F.encode(x, scale.detach(), LIMITS)
    return F.decode_learned_step(F.round_ste(v), v, F.positive(scale), LIMITS)


def graph_of(function: Any, *args: Any) -> list[Any]:
    """What Dynamo's graph of a function calls."""
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, example: Any) -> Any:
        found.extend(node.target for node in module.graph.nodes if node.op.startswith("call"))
        return module.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()


@pytest.mark.skipif(not leaf._SUPPORTED, reason="this torch does not tell that it is compiling")
def test_dynamo_sees_operators() -> None:
    targets = graph_of(fake_quantize, torch.randn(8), torch.tensor(0.1, requires_grad=True))
    names = [str(t).split(".")[1] if isinstance(t, torch._ops.OpOverload) else t for t in targets]
    assert names == ["detach", "encode", "round_ste", "positive", "decode_learned_step"]


def test_gradients_are_those_of_the_functions() -> None:
    x = torch.randn(64).requires_grad_()
    scale = torch.tensor(0.1, requires_grad=True)
    upstream = torch.randn(64)
    expected = torch.autograd.grad(fake_quantize(x, scale), (x, scale), upstream)
    for backend in ("eager", "aot_eager"):
        out = torch.compile(fake_quantize, backend=backend, fullgraph=True)(x, scale)
        found = torch.autograd.grad(out, (x, scale), upstream)
        assert torch.equal(found[0], expected[0]), backend
        torch.testing.assert_close(found[1], expected[1])  # a compiler's formula for the same sum is another one


def test_within_transforms_dynamo_sees_the_functions() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: (fake_quantize(t, torch.tensor(0.1)) ** 2).sum())(x)

    x = torch.randn(16)
    assert torch.equal(torch.compile(gradient, backend="eager", fullgraph=True)(x), gradient(x))


def test_the_name_changes_with_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    before = leaf._version()
    leaf._version.cache_clear()
    (tmp_path / "functional.py").write_text("changed")
    monkeypatch.setattr(leaf, "__file__", str(tmp_path / "leaf.py"))
    try:
        assert leaf._version() != before
        (tmp_path / "functional.py").unlink()
        leaf._version.cache_clear()
        first = leaf._version()
        leaf._version.cache_clear()
        assert leaf._version() != first  # without sources: never found again
    finally:
        leaf._version.cache_clear()


def test_images_of_other_sizes_compile_once() -> None:
    compiled: list[Any] = []

    def backend(module: torch.fx.GraphModule, example: Any) -> Any:
        compiled.append(module)
        return module.forward

    layer = torch.nn.Conv2d(4, 8, 3, padding=1)
    qtemper.prepare(layer, "lsq", qtemper.BitPolicy(4, 4, first_last="same"))
    qtemper.calibrate(layer, [torch.rand(2, 4, 8, 8)])
    network = torch.compile(layer.train(), backend=backend, dynamic=True)
    for size in (8, 9, 12):
        network(torch.rand(2, 4, size, size + 1))
    assert len(compiled) == 1
