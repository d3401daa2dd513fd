"""RAND, against its twin by loops."""

import copy

import pytest
import torch

import qtemper
from qtemper import functional as F
from qtemper.methods.rand import RAND
from tests.references.rand import rand
from tests.test_methods import data, make


def groups(x, axis, block):
    """Index lists of the elements that share a scale."""
    index = torch.arange(x.numel()).view(x.shape)
    rows = index.reshape(1, -1) if axis is None else index.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows.reshape(-1, block).tolist() if block else rows.tolist()


@pytest.mark.parametrize("mode", ["max", "norm"])
@pytest.mark.parametrize(("axis", "block"), [(None, 0), (1, 0), (1, 7), (None, 12), (0, 3)])
@pytest.mark.parametrize(("bits", "levels"), [(1, "symmetric"), (2, "signed"), (4, "signed"), (8, "symmetric")])
def test_equals_its_twin(mode, axis, block, bits, levels):
    quantizer = make(RAND(mode=mode, block=block), "weight", bits, levels, 1.0 if axis is None else [1.0] * 3, axis)
    x, g = data(levels)
    out = quantizer(x)
    out.backward(g)
    zeta = 0.5 * quantizer.rounding.noise.signed(x).double().flatten()
    _, qmax, z = F.code_range(bits, levels)
    top = qmax - z
    w_hat, dw, scales = (torch.zeros(x.numel(), dtype=torch.float64) for _ in range(3))
    for part in groups(x, axis, block):
        arrays = (t.flatten()[part].tolist() for t in (x.detach(), zeta, g))
        a, b, c = rand(*arrays, top, mode == "norm")
        w_hat[part], dw[part], scales[part] = torch.tensor(a).double(), torch.tensor(b).double(), c
    # The twin's lists pass through float64; the sums are in another order.
    torch.testing.assert_close(out.flatten(), w_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.flatten(), dw, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.grid.scale(x).expand(x.shape).flatten(), scales, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mode", ["max", "norm"])
def test_nothing_is_clipped_and_tiny_or_zero_weights_are_finite(mode):
    quantizer = make(RAND(mode=mode), "weight", 4, "signed", 1.0).eval()
    x, _ = data("signed")
    v = quantizer.grid.encode(x)
    torch.testing.assert_close(v * quantizer.grid.scale(x), x, rtol=1e-12, atol=1e-12)
    for factor in (0.0, 1e-12, 1e-6):
        small = (x.detach().float() * factor).requires_grad_()
        twin = make(RAND(mode=mode), "weight", 4, "signed", 1.0).float()
        twin(small).sum().backward()
        assert torch.isfinite(small.grad).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_largest_weight_keeps_its_own_gradient(bits):
    """In float32, where its position is now and then a little beyond the last code."""
    quantizer = make(RAND(scale_gradient=False), "weight", bits, "signed", 1.0).float()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = torch.randn(64, generator=generator).requires_grad_()
        quantizer(x).sum().backward()
        assert float(x.grad.min()) > 0.99


@pytest.mark.parametrize("block", [0, 7])
def test_without_the_scales_gradient_the_weights_get_the_outputs(block):
    twins = (make(RAND(block=block, scale_gradient=kept), "weight", 4, "signed", 1.0) for kept in (True, False))
    (out, with_it), (same, without) = ((q(x), x) for q in twins for x in [data("signed")[0]])
    g = data("signed")[1]
    torch.autograd.backward([out, same], [g, g])
    assert torch.equal(out, same)
    torch.testing.assert_close(without.grad, g, rtol=1e-12, atol=0)  # times the scale, and divided by it
    assert (with_it.grad - g).abs().max() > 0.1


def test_before_the_start_weights_stay_as_they_are():
    quantizer = make(RAND(start=0.5), "weight", 4, "signed", 1.0)
    x, _ = data("signed")
    torch.testing.assert_close(quantizer(x), x, rtol=1e-12, atol=1e-12)
    quantizer.set_progress(0.5)
    assert (quantizer(x) - x).abs().max() > 0.1 * quantizer.grid.scale(x).item()


@pytest.mark.parametrize("block", [0, 9])
def test_both_paths_agree_in_eval_mode(block):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(5, 6, 7, 7).relu()
    qtemper.prepare(layer, RAND(block=block), qtemper.BitPolicy(4, 4, "same"))
    qtemper.calibrate(layer, [x])
    layer.eval()
    fast = layer(x)
    qtemper.fast.use_fast_path(False)
    plain = layer(x)
    qtemper.fast.use_fast_path(True)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    copy.deepcopy(layer)
