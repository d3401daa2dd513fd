"""NIPQ's noise, against its twin."""

import pytest
import torch

import qtemper
from qtemper import functional as F
from qtemper.methods.nipq import NIPQ
from qtemper.quantizer import QuantSpec
from tests.references.nipq import draw
from tests.test_methods import CASES, data, make, run


@pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
def test_equals_its_twin(bits, levels, kind):
    scale = 2.5 / 2**bits
    quantizer = make(NIPQ(), kind, bits, levels, scale)
    out, dx, ds = run(quantizer, levels)
    x, g = data(levels)
    qmin, qmax, z = F.code_range(bits, levels)
    v = torch.clamp(x.detach() / scale + z, qmin, qmax)
    u = quantizer.rounding.noise(x)
    parts = zip(v.flatten(1), u.flatten(1), strict=True) if kind == "activation" else [(v.flatten(), u.flatten())]
    noise = torch.tensor([n for a, b in parts for n in draw(a.tolist(), b.tolist())], dtype=torch.float64).view(v.shape)
    inside = (v > qmin) & (v < qmax)
    torch.testing.assert_close(out, (v + noise - z) * scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, torch.where(inside, g, 0.0), rtol=1e-12, atol=1e-12)
    count = x.numel() // (x.shape[0] if kind == "activation" else 1)
    expected = (g * torch.where(inside, noise, v - z)).sum() / (count * (qmax or -qmin)) ** 0.5
    assert float(ds) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_the_noise_has_the_distribution_of_the_error():
    """An error that is anything but uniform: positions near codes."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(-6, 6, (200_000,), generator=generator) + 0.1 * torch.randn(200_000, generator=generator)
    rounding = NIPQ().rounding("weight", QuantSpec(4))
    noise, error = rounding(v) - v, torch.round(v) - v
    assert float(noise.mean()) == pytest.approx(float(error.mean()), abs=6 * 0.1 / 200_000**0.5)
    # A bin's width is 1/256; six standard errors of a standard deviation are 1 %.
    assert float(noise.std()) == pytest.approx(float(error.std()), rel=0.01)
    correlation = torch.corrcoef(torch.stack([noise, error]))[0, 1]
    assert abs(float(correlation)) < 6 / 200_000**0.5, "not the element's own error"


def test_clipped_elements_and_codes_have_none_and_nothing_inside_is_sound():
    rounding = NIPQ().rounding("activation", QuantSpec(2))
    v = torch.tensor([[0.0, 3.0, 3.0], [0.0, 0.4, 3.0]])
    assert torch.equal(rounding(v)[0], v[0])
    assert float(rounding(v)[1, 1]) == pytest.approx(0.4 - 0.4, abs=1 / 256)  # the one error there is
    assert rounding(torch.zeros(0, 3)).shape == (0, 3)


def test_the_noise_of_a_sample_does_not_depend_on_blocks(monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(5, 6, 7, 7).relu()
    qtemper.prepare(layer, NIPQ(), qtemper.BitPolicy(8, 8, "same"))
    qtemper.calibrate(layer, [x])
    whole = layer(x)
    monkeypatch.setattr(qtemper.fast.blocks, "BLOCK", 300)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)
