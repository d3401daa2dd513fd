"""PACT's equations against a float64 twin."""

import pytest
import torch

from qtemper import functional as F
from qtemper.methods.dorefa import DoReFa
from qtemper.methods.pact import PACT
from tests.references.pact import pact
from tests.test_methods import data, make


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_equal_their_twin(bits):
    quantizer = make(PACT(), "activation", bits, "unsigned", 1.3 / (2**bits - 1))
    x, g = data("unsigned")
    out = quantizer(x)
    out.backward(g)
    alpha = quantizer.grid.alpha.item()
    assert alpha == pytest.approx(1.3)
    xhat, dx, dalpha = pact(x.flatten().tolist(), alpha, bits, g.flatten().tolist())
    torch.testing.assert_close(out.flatten(), torch.tensor(xhat, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(dx, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert quantizer.grid.alpha.grad.item() == pytest.approx(dalpha, rel=1e-12)


@pytest.mark.parametrize("levels", ["signed", "symmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_lowest_level_moves_with_alpha(bits, levels):
    quantizer = make(PACT(), "activation", bits, levels, 2.0 / 2**bits)
    x, g = data(levels)
    quantizer(x).backward(g)
    qmin, qmax, zero = F.code_range(bits, levels)
    s = 2.0 / 2**bits
    bins = (qmax - zero) or (zero - qmin)
    position = x.detach() / s + zero
    above, below = position >= qmax, position <= qmin
    expected = g[above].sum() * (qmax - zero) / bins + g[below].sum() * (qmin - zero) / bins
    torch.testing.assert_close(quantizer.grid.alpha.grad, expected.reshape(1), rtol=1e-10, atol=1e-12)


def test_weights_are_dorefas():
    x, _ = data("symmetric")
    ours, theirs = (make(m, "weight", 3, "symmetric", 1.0)(x) for m in (PACT(), DoReFa()))
    assert torch.equal(ours, theirs)


def test_alpha_can_start_at_the_papers_constant():
    quantizer = make(PACT(initial=8.0), "activation", 2, "unsigned", 0.1)
    assert quantizer.grid.alpha.item() == 8.0
    with pytest.raises(ValueError, match="positive"):
        PACT(initial=-1.0)
