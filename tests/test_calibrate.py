"""Calibration: the scale that each criterion asks for, and what it may not change."""

import math

import pytest
import torch
from torch import nn

import qtemper
from qtemper import BitPolicy, CalibrationError
from qtemper.calibrate import OBSERVERS, search_scale
from qtemper.functional import code_range

SAME = BitPolicy(4, 4, "same")


def samples(kind, n=20_000):
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.relu() if kind == "unsigned" else x


def squared_error(x, scale, codes):
    """The naive twin: quantize one value after the other."""
    total = 0.0
    for value in x.flatten().tolist():
        code = min(max(round(value / scale + codes.zero_point), codes.qmin), codes.qmax)
        total += (value - scale * (code - codes.zero_point)) ** 2
    return total / x.numel()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("levels", ["unsigned", "signed", "symmetric"])
def test_mse_finds_the_least_squares_step(bits, levels):
    if (bits, levels) == (1, "signed"):
        pytest.skip("two's complement at one bit has no positive level: nothing asks for it")
    codes = code_range(bits, levels)
    x = samples(levels, 2000)
    found = float(search_scale(x, codes, "mse")[0])
    best = min(
        squared_error(x, found * factor, codes)
        for factor in torch.linspace(0.25, 4.0, 120, dtype=torch.float64).tolist()
    )
    # The search's last grid is 1% apart, and over 2,000 samples the error at 8 bits is jagged at that resolution.
    assert squared_error(x, found, codes) <= 1.02 * best


def test_one_bit_weights_get_their_mean_magnitude():
    x = samples("symmetric")
    scale = float(search_scale(x, code_range(1, "symmetric"), "mse")[0])
    assert scale / 2 == pytest.approx(float(x.abs().mean()), rel=0.01)


def test_the_other_criteria():
    x = samples("signed")
    codes = code_range(4, "signed")
    top = float(torch.maximum(x.max() / 7, -x.min() / 8))
    assert float(search_scale(x, codes, "max")[0]) == pytest.approx(top)
    assert float(search_scale(x, codes, "lsq")[0]) == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7))
    # EWGS's code: weights between +-3 standard deviations; activations up to 3 std(x) / sqrt(1 - 2 / pi).
    assert float(search_scale(x, codes, "ewgs")[0]) == pytest.approx(6 * float(x.std()) / 15, rel=1e-3)
    half = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).abs()
    assert float(search_scale(half, code_range(4, "unsigned"), "ewgs")[0]) == pytest.approx(3 / 15, rel=0.01)
    clipped = float(search_scale(x, codes, "percentile")[0])
    assert 0.7 * top < clipped < top


def test_the_formula_of_lsq_is_over_each_channel_and_nothing_else():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    layer.weight.data.fill_(0.1)[:, 0, 0, 0] = 1.0
    rule = qtemper.Rule("*", weight_granularity="channel")
    qtemper.prepare(nn.Sequential(layer), "lsq", BitPolicy(4, 4, "same", rules=(rule,)))
    qtemper.calibrate(layer, [torch.randn(2, 4, 8, 8)], observer="lsq")
    expected = 2 * (8 * 0.1 + 1.0) / 9 / math.sqrt(7)
    torch.testing.assert_close(layer.weight_quantizer.grid.step, torch.full((4,), expected))


@pytest.mark.parametrize("observer", ["lsq", "ewgs"])
def test_a_scale_that_nothing_will_train_is_fitted_by_least_squares(observer):
    def scales(method, observer):
        torch.manual_seed(0)
        model = qtemper.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), method, BitPolicy(4, 4, "8bit"))
        qtemper.calibrate(model, [torch.randn(64, 8)], observer=observer)
        return {name: q.grid.scale(torch.ones(1, 8)).item() for name, q in qtemper.quantizers(model)}

    assert scales("ste", observer) == scales("ste", "mse")
    start, fitted = scales("lsq", observer), scales("lsq", "mse")
    same = {name for name in start if start[name] == fitted[name]}
    assert same == {"0.act_quantizer"}  # the network's input at 8 bits keeps its scale


def test_nothing_is_clipped_by_a_rounding_error():
    x = torch.rand(4096, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    codes = code_range(4, "symmetric")
    position = x * search_scale(x, codes, "max")[:, None].reciprocal() + codes.zero_point
    assert position.min() >= codes.qmin
    assert position.max() <= codes.qmax


@pytest.mark.parametrize("observer", OBSERVERS)
def test_signs_are_found_out_and_the_mode_is_kept(observer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    model[3].eval()
    qtemper.prepare(model, "lsq", SAME)
    latent = [p.clone() for n, p in model.named_parameters() if "quantizer" not in n]
    qtemper.calibrate(model, [torch.randn(64, 5)], observer=observer)
    assert [model[i].act_quantizer.grid.levels for i in (0, 2, 4)] == ["signed", "unsigned", "signed"]
    assert model.training
    assert not model[3].training
    after = [p for n, p in model.named_parameters() if "quantizer" not in n]
    assert all(torch.equal(a, b) for a, b in zip(latent, after, strict=True))


def test_one_bit_signed_inputs_get_the_symmetric_grid():
    model = qtemper.prepare(nn.Linear(5, 5), "lsq", BitPolicy(1, 1, "same"))
    qtemper.calibrate(model, [torch.randn(64, 5)])
    assert model.act_quantizer.grid.levels == "symmetric"
    assert model.weight_quantizer.grid.levels == "symmetric"


def test_a_dead_channel_borrows_a_scale():
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    rule = qtemper.Rule("*", weight_granularity="channel")
    model = qtemper.prepare(nn.Sequential(layer), "lsq", BitPolicy(4, 4, "same", rules=(rule,)))
    qtemper.calibrate(model, [torch.randn(2, 3, 8, 8)])
    step = layer.weight_quantizer.grid.step
    assert (step > 1e-3).all()
    assert (layer.weight[1] == 0).all()


def test_a_failure_leaves_the_model_as_it_was():
    model = qtemper.prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "lsq", SAME)
    qtemper.calibrate(model, [torch.randn(8, 3)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError):
        qtemper.calibrate(model, [torch.full((8, 3), math.nan)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batch_norm_is_re_estimated_in_the_quantized_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    batches = [torch.randn(16, 3, 10, 10) for _ in range(3)]
    qtemper.prepare(model, "tempering", BitPolicy(2, 2, "same"))
    qtemper.calibrate(model, batches, batch_norm=True)
    with torch.no_grad():
        outputs = [model[0].eval()(batch) for batch in batches]
    mean = torch.stack([out.mean(dim=(0, 2, 3)) for out in outputs]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.1


def test_a_small_last_batch_weighs_what_it_has():
    torch.manual_seed(0)
    batches = [torch.randn(64, 3), torch.randn(64, 3), torch.randn(2, 3) + 5]
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 3))
    qtemper.prepare(model, "lsq", SAME)
    qtemper.calibrate(model, batches, batch_norm=True)
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean(0), rtol=1e-4, atol=1e-5)
    assert model[0].momentum == 0.3
    statistics = model[0].running_mean.clone()
    with pytest.raises(CalibrationError, match="too small"):
        qtemper.calibrate(model, [torch.randn(9, 3) + 1, torch.randn(1, 3)], batch_norm=True)
    assert torch.equal(model[0].running_mean, statistics)


def test_dictionaries_tuples_and_functions_of_batches():
    class Named(nn.Linear):
        def forward(self, pixels):
            return super().forward(pixels)

    x = torch.randn(8, 3)
    for batches, forward in (
        ([{"pixels": x}], None),
        ([(x, torch.zeros(8))], None),
        ([x], None),
        ([[x, 0]], lambda m, b: m(b[0])),
    ):
        model = qtemper.prepare(
            nn.Sequential(nn.Linear(3, 3)) if not isinstance(batches[0], dict) else Wrapped(), "lsq", SAME
        )
        qtemper.calibrate(model, batches, forward=forward)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, pixels):
        return self.inner(pixels)
