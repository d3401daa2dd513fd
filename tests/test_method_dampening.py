"""Dampening, against the loss term written out, and against the base method."""

import pytest
import torch

import qtemper
from qtemper import functional as F
from qtemper.config import to_dict
from qtemper.methods.dampening import Dampening
from qtemper.methods.lsq import LSQ
from qtemper.methods.rand import RAND
from qtemper.methods.tempering import NoiseTempering
from qtemper.schedules import Constant
from tests.test_methods import CASES, data, make, run, same


@pytest.mark.parametrize(("bits", "levels"), sorted({(b, lv) for b, lv, kind in CASES if kind == "weight"}))
@pytest.mark.parametrize("base", [LSQ(), NoiseTempering(scale_on="none")], ids=lambda m: m.name)
def test_the_gradient_is_that_of_the_loss_term(bits, levels, base):
    scale, strength = 2.5 / 2**bits, 0.3
    method = Dampening(base=base, strength=Constant(strength))
    out, dx, ds = _run(method, bits, levels, scale)
    plain, dx0, ds0 = _run(base, bits, levels, scale)
    assert torch.equal(out, plain)
    assert torch.equal(ds, ds0)
    x = data(levels)[0]
    qmin, qmax, z = F.code_range(bits, levels)
    total = 0.0
    for value in x.flatten():
        clipped = torch.clamp(value, (qmin - z) * scale, (qmax - z) * scale)
        hard = (torch.round(clipped / scale + z) - z) * scale
        total = total + strength * (hard.detach() - clipped) ** 2
    (expected,) = torch.autograd.grad(total, x)
    # strength is a float32 buffer.
    torch.testing.assert_close(dx - dx0, expected, rtol=1e-6, atol=1e-9)


def _run(method, bits, levels, scale):
    quantizer = make(method, "weight", bits, levels, scale)
    x, g = data(levels)
    out = quantizer(x)
    out.backward(g)
    (step,) = quantizer.grid.parameters()
    return out.detach(), x.grad, step.grad


def test_activations_and_a_strength_of_zero_are_the_base_method():
    assert same(*(run(make(m, "activation", 2, "unsigned", 0.6), "unsigned") for m in (Dampening(), LSQ())))
    start = make(Dampening(), "weight", 2, "signed", 0.6)
    assert float(start.grid.strength) == 0.0
    start.set_progress(1.0)
    assert float(start.grid.strength) == pytest.approx(0.1)
    assert same(_run(Dampening(strength=Constant(0.0)), 2, "signed", 0.6), _run(LSQ(), 2, "signed", 0.6))


def test_one_step_of_a_layer_adds_the_term_once_on_both_paths():
    found = []
    for enabled in (True, False):
        qtemper.fast.use_fast_path(enabled)
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 4)
        x = torch.randn(5, 6).relu()
        qtemper.prepare(layer, Dampening(strength=Constant(0.3)), qtemper.BitPolicy(2, 2, "same"))
        qtemper.calibrate(layer, [x])
        (layer(x) * 0.0).sum().backward()
        found.append(layer.latent_weight.grad)
        w, scale = layer.latent_weight.detach(), layer.weight_quantizer.grid.scale(x).item()
        hard = torch.round(torch.clamp(w / scale, -2, 1)) * scale
        clipped = torch.clamp(w, -2 * scale, scale)
        torch.testing.assert_close(found[-1], 0.6 * (clipped - hard), rtol=1e-5, atol=1e-6)
    qtemper.fast.use_fast_path(True)


def test_it_wraps_any_method_with_its_settings_and_not_itself():
    for name in qtemper.methods_available():
        if name != "dampening":
            quantizer = make(Dampening(base=qtemper.get_method(name)), "weight", 4, "signed", 0.3)
            x, g = data("signed")
            quantizer(x).backward(g)
            assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="itself"):
        Dampening(base=Dampening())
    assert to_dict(Dampening(base=RAND(block=8)))["base"]["block"] == 8
