"""LSQ+'s equations against a float64 twin."""

import pytest
import torch

from qtemper.methods.lsq import LSQ
from qtemper.methods.lsq_plus import LSQPlus
from tests.references.lsq_plus import lsq_plus
from tests.test_methods import data, make, run, same


@pytest.mark.parametrize("levels", ["unsigned", "signed", "symmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_equal_their_twin(bits, levels):
    s = 2.5 / 2**bits
    quantizer = make(LSQPlus(), "activation", bits, levels, s)
    with torch.no_grad():
        quantizer.grid.offset.sub_(0.17)
    x, g = data("signed")
    out = quantizer(x)
    out.backward(g)
    beta = quantizer.grid.offset.item()
    xhat, dx, ds, dbeta = lsq_plus(x.flatten().tolist(), s, beta, bits, g.flatten().tolist(), x.numel() // x.shape[0])
    torch.testing.assert_close(out.flatten(), torch.tensor(xhat, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(dx, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert quantizer.grid.step.grad.item() == pytest.approx(ds, rel=1e-9, abs=1e-12)
    assert quantizer.grid.offset.grad.item() == pytest.approx(dbeta, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("levels", ["unsigned", "signed", "symmetric"])
def test_it_starts_on_the_calibrated_grid(levels):
    x, _ = data(levels)
    ours, plain = (make(m, "activation", 3, levels, 0.31).eval()(x) for m in (LSQPlus(), LSQ()))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_are_lsqs(bits):
    ours, theirs = (run(make(m, "weight", bits, "signed", 0.4), "signed") for m in (LSQPlus(), LSQ()))
    assert same(ours, theirs)
