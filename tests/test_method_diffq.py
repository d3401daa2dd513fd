"""DiffQ's equations against a float64 twin."""

import pytest
import torch

from qtemper.methods.diffq import DiffQ
from qtemper.methods.lsq import LSQ
from tests.references.diffq import diffq
from tests.test_methods import data, make, run, same


def noise_of(quantizer, x):
    source = quantizer.rounding.noise
    if type(quantizer.rounding).__name__ == "UniformNoise":
        return 0.5 * source.signed(x).double()
    return 0.5 * source.gaussian(x).double()


@pytest.mark.parametrize("noise", ["gaussian", "uniform", None])
@pytest.mark.parametrize("levels", ["signed", "symmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_equal_their_twin(bits, levels, noise):
    quantizer = make(DiffQ(noise=noise or "uniform"), "weight", bits, levels, 1.0)
    x, g = data("signed")
    if noise is None:
        quantizer.eval()
    out = quantizer(x)
    out.backward(g)
    u = None if noise is None else noise_of(quantizer, x).flatten().tolist()
    what, dw = diffq(x.flatten().tolist(), bits, g.flatten().tolist(), u)
    torch.testing.assert_close(out.flatten(), torch.tensor(what, dtype=torch.float64), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(dw, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("noise", "std"), [("gaussian", 0.5), ("uniform", 12**-0.5)])
def test_the_noise_has_its_moments(noise, std):
    quantizer = make(DiffQ(noise=noise), "weight", 4, "signed", 1.0)
    u = noise_of(quantizer, torch.zeros(200, 500))
    assert u.std().item() == pytest.approx(std, rel=0.01)
    assert u.mean().item() == pytest.approx(0, abs=0.005)
    assert u.abs().max() <= quantizer.rounding.reach


def test_each_channel_has_its_own_range():
    x, _ = data("signed")
    out = make(DiffQ(), "weight", 2, "signed", [1.0, 1.0, 1.0], axis=1).eval()(x)
    torch.testing.assert_close(out.amax((0, 2)), x.amax((0, 2)))
    torch.testing.assert_close(out.amin((0, 2)), x.amin((0, 2)))


def test_a_constant_channel_stays_as_it_is():
    x = torch.ones(4, 3, 7, dtype=torch.float64, requires_grad=True)
    quantizer = make(DiffQ(), "weight", 2, "signed", [1.0, 1.0, 1.0], axis=1)
    out = quantizer(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), x.detach(), rtol=0, atol=1e-7)
    assert torch.isfinite(x.grad).all()


def test_activations_are_lsqs():
    ours, theirs = (run(make(m, "activation", 3, "unsigned", 0.3), "unsigned") for m in (DiffQ(), LSQ()))
    assert same(ours, theirs)
