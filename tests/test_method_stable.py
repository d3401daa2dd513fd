"""StableQAT's equations against a float64 twin."""

import pytest
import torch

from qtemper import functional as F
from qtemper.methods.lsq import LSQ
from qtemper.methods.stable import AMPLITUDE_MAX, StableQAT, slope
from tests.references.lsq import lsq
from tests.references.stable import slope as twin
from tests.test_methods import CASES, data, make, run, same


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
def test_it_is_lsq_with_another_slope(bits, levels, kind, order):
    scale = 2.5 / 2**bits
    quantizer = make(StableQAT(order=order, on="both"), kind, bits, levels, scale)
    x, g = data(levels)
    out = quantizer(x)
    out.backward(g)
    qmin, qmax, offset = F.code_range(bits, levels)
    count = x.numel() // (x.shape[0] if kind == "activation" else 1)
    values = x.flatten().tolist()
    vhat, dv, ds = lsq(values, scale, -qmin, qmax, g.flatten().tolist(), count, offset)
    expected = [d * twin(value / scale + offset, 0.21, order) for d, value in zip(dv, values, strict=True)]
    torch.testing.assert_close(out.flatten(), torch.tensor(vhat, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    # The amplitude is a float32 constant in the module, and 1 - h divides its error by 1 - h = 0.07.
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-9)
    assert quantizer.grid.step.grad.item() == pytest.approx(ds, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
@pytest.mark.parametrize("method", [StableQAT(amplitude=0.0, on="both"), StableQAT(amplitude=0.0, order=3, on="both")])
def test_without_amplitude_it_is_lsq_to_the_bit(bits, levels, kind, method):
    ours, theirs = (run(make(m, kind, bits, levels, 2.5 / 2**bits), levels) for m in (method, LSQ()))
    assert same(ours, theirs)


def test_published_values():
    strength = torch.tensor(0.21 / AMPLITUDE_MAX, dtype=torch.float64)
    at = slope(torch.tensor([0.0, 3.0, 0.5, 1.5], dtype=torch.float64), strength, 1)
    torch.testing.assert_close(at, torch.tensor([0.035, 0.035, 1, 1], dtype=torch.float64), rtol=0, atol=5e-4)
    bin_ = torch.linspace(-0.5, 0.5, 100001, dtype=torch.float64)
    assert slope(bin_, strength, 1).mean().item() == pytest.approx(0.30, abs=0.005), "the docstring's number"


@pytest.mark.parametrize("order", range(1, 17))
def test_the_slope_stays_positive(order):
    v = torch.linspace(-1.0, 1.0, 4001, dtype=torch.float64)
    rho = slope(v, torch.tensor(0.9999, dtype=torch.float64), order)
    assert rho.min() > 0
    assert rho.max() <= 1 + 1e-9


@pytest.mark.parametrize("setting", [{"amplitude": 0.23}, {"amplitude": -0.1}, {"order": 0}, {"order": 17}])
def test_unusable_settings_are_refused(setting):
    with pytest.raises(ValueError, match="must be"):
        StableQAT(**setting)
