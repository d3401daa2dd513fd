"""DoReFa's equations against a float64 twin."""

import pytest
import torch

from qtemper.methods.dorefa import DoReFa
from tests.references import dorefa as twin
from tests.test_methods import data, make


def close(ours, expected):
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", ["unit", "real"])
@pytest.mark.parametrize("maximum", ["exact", "constant"])
def test_weights_equal_their_twin(bits, scale, maximum):
    quantizer = make(DoReFa(scale=scale, maximum=maximum), "weight", bits, "symmetric", 1.0)
    x, g = data("symmetric")
    out = quantizer(x)
    out.backward(g)
    flat, grads = x.flatten().tolist(), g.flatten().tolist()
    expected, dw = twin.weights(flat, bits, grads, real=scale == "real", exact=maximum == "exact")
    close(out, expected)
    close(x.grad, dw)
    assert torch.equal(quantizer.eval()(x), out)


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_equal_their_twin(bits):
    quantizer = make(DoReFa(), "activation", bits, "unsigned", 1.0)
    x, g = data("unsigned")
    out = quantizer(x)
    out.backward(g)
    expected, dx = twin.activations(x.flatten().tolist(), bits, g.flatten().tolist())
    close(out, expected)
    close(x.grad, dx)


def test_each_channel_has_its_own_maximum():
    x, _ = data("symmetric")
    out = make(DoReFa(), "weight", 4, "symmetric", [1.0, 1.0, 1.0], axis=1)(x)
    assert torch.equal(out.detach().abs().amax((0, 2)), torch.ones(3, dtype=torch.float64))


def test_a_channel_of_zeros_is_no_nan():
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 0
    x.requires_grad_()
    for bits in (1, 4):
        out = make(DoReFa(), "weight", bits, "symmetric", [1.0, 1.0, 1.0], axis=1)(x)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(x.grad).all()


def test_calibration_gives_activations_their_range_if_asked():
    quantizer = make(DoReFa(scale="real"), "activation", 2, "unsigned", 0.7).eval()
    assert quantizer(torch.tensor([5.0], dtype=torch.float64)).item() == pytest.approx(2.1, rel=1e-6)
