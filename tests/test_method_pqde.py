"""PQDE's soft round, against its twin."""

import math

import pytest
import torch

from qtemper import functional as F
from qtemper.methods.lsq import LSQ
from qtemper.methods.pqde import PQDE
from qtemper.quantizer import QuantSpec
from qtemper.schedules import Constant
from tests.test_methods import CASES, data, make, run, same


@pytest.mark.parametrize("k", [0.5, 4.0, 64.0])
@pytest.mark.parametrize("gradient", ["soft", "straight"])
@pytest.mark.parametrize(("bits", "levels", "kind"), CASES[::4])
def test_equals_its_twin(bits, levels, kind, k, gradient):
    scale = 2.5 / 2**bits
    out, dx, ds = run(make(PQDE(sharpness=Constant(k), gradient=gradient), kind, bits, levels, scale), levels)
    x, g = data(levels)
    qmin, qmax, z = F.code_range(bits, levels)
    total = 0.0
    for i, (value, grad) in enumerate(zip(x.flatten().tolist(), g.flatten().tolist(), strict=True)):
        v = min(max(value / scale + z, qmin), qmax)
        inside = qmin < v < qmax
        f = v - math.floor(v) - 0.5
        position = math.floor(v) + 0.5 + math.atan(k * f) / (2 * math.atan(k / 2))
        slope = k / (2 * math.atan(k / 2) * (1 + (k * f) ** 2)) if gradient == "soft" else 1.0
        assert out.flatten()[i].item() == pytest.approx((position - z) * scale, abs=1e-12)
        assert dx.flatten()[i].item() == pytest.approx(grad * slope if inside else 0.0, rel=1e-9, abs=1e-12)
        total += grad * (position - v if inside else v - z)
    count = x.numel() // (x.shape[0] if kind == "activation" else 1)
    assert float(ds) == pytest.approx(total / (count * (qmax or -qmin)) ** 0.5, rel=1e-9, abs=1e-12)


def test_it_hardens_and_ends_as_lsq_to_the_bit():
    quantizer = make(PQDE(), "weight", 2, "signed", 0.6)
    distance = []
    for progress in (0.0, 0.3, 0.6, 0.89, 0.9, 1.0):
        quantizer.set_progress(progress)
        soft, hard = quantizer(data("signed")[0]), quantizer.eval()(data("signed")[0])
        quantizer.train()
        distance.append(float((soft - hard).abs().mean().detach()))
    assert distance == sorted(distance, reverse=True)
    assert distance[-2:] == [0.0, 0.0]
    assert same(run(quantizer, "signed"), run(make(LSQ(), "weight", 2, "signed", 0.6), "signed"))


def test_codes_stay_and_the_round_is_continuous():
    rounding = PQDE(sharpness=Constant(8.0), gradient="soft").rounding("weight", QuantSpec(4))
    v = torch.arange(-8.0, 8.0)
    assert torch.equal(rounding(v), v)
    assert torch.allclose(rounding(v - 1e-6), v, atol=1e-5)  # slope below 1 at a code


def test_sharpness_has_to_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        PQDE(sharpness=Constant(0.0))


@pytest.mark.parametrize(("k", "square"), [(6.0, 1.49), (20.0, 3.63)])
def test_the_soft_gradient_has_mean_1_and_a_mean_square_that_depth_would_multiply(k, square):
    rounding = PQDE(sharpness=Constant(k), gradient="soft").rounding("activation", QuantSpec(4))
    v = (torch.arange(10_000, dtype=torch.float64) / 1000 + 5e-4).requires_grad_()  # evenly over ten bins
    rounding(v).sum().backward()
    assert float(v.grad.mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(v.grad.square().mean()) == pytest.approx(square, abs=5e-3)
