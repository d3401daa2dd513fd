"""Quant-Noise, against its twin."""

import pytest
import torch

from qtemper import functional as F
from qtemper.methods.lsq import LSQ
from qtemper.methods.quant_noise import QuantNoise
from qtemper.methods.ste import StraightThrough
from qtemper.quantizer import QuantSpec
from tests.test_methods import CASES, data, make, run, same


@pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
def test_equals_its_twin(bits, levels, kind):
    scale, p = 2.5 / 2**bits, 0.4
    quantizer = make(QuantNoise(probability=p), kind, bits, levels, scale)
    out, dx, ds = run(quantizer, levels)
    x, g = data(levels)
    u = quantizer.rounding.noise(x).flatten().tolist()
    qmin, qmax, z = F.code_range(bits, levels)
    total = 0.0
    for i, (value, grad) in enumerate(zip(x.flatten().tolist(), g.flatten().tolist(), strict=True)):
        v = min(max(value / scale + z, qmin), qmax)
        inside = qmin < v < qmax
        position = round(v) if u[i] < p else v  # Python's round is half to even, as torch's
        assert out.flatten()[i].item() == pytest.approx((position - z) * scale, abs=1e-12)
        assert dx.flatten()[i].item() == pytest.approx(grad if inside else 0.0, abs=1e-12)
        total += grad * (position - v if inside else v - z)
    count = x.numel() // (x.shape[0] if kind == "activation" else 1)
    assert float(ds) == pytest.approx(total / (count * (qmax or -qmin)) ** 0.5, rel=1e-9, abs=1e-12)


def test_probability_one_is_lsq_to_the_bit():
    assert same(*(run(make(m, "weight", 2, "signed", 0.6), "signed") for m in (QuantNoise(probability=1.0), LSQ())))


def test_the_share_is_the_probability_and_each_step_has_another_subset():
    rounding = QuantNoise(probability=0.3).rounding("weight", QuantSpec(4))
    v = torch.full((100_000,), 0.25)
    first = rounding(v) == 0
    assert float(first.float().mean()) == pytest.approx(0.3, abs=6 * (0.21 / 1e5) ** 0.5)
    rounding.set_progress(0.5)
    assert not torch.equal(rounding(v) == 0, first)


def test_on_one_kind_only():
    method = QuantNoise(noise_on="weights")
    assert isinstance(method.rounding("activation", QuantSpec(2)), StraightThrough)
    with pytest.raises(ValueError, match="probability"):
        QuantNoise(probability=0.0)
