"""The methods' own equations, against float64 twins; the identities of noise tempering."""

import math

import pytest
import torch

import qtemper
from qtemper import functional as F
from qtemper.methods import method_class
from qtemper.methods.ewgs import EWGS
from qtemper.methods.lsq import LSQ
from qtemper.methods.tempering import ZERO_MEAN, CorrelationDelta, NoiseTempering
from qtemper.quantizer import Quantizer, QuantSpec
from qtemper.schedules import Constant
from tests.references.ewgs import ewgs
from tests.references.lsq import lsq

OFF = Constant(0.0)


def make(method, kind, bits, levels, scale, axis=None):
    spec = QuantSpec(bits, levels, axis)
    quantizer = Quantizer(spec, method.grid(kind, spec, 3), method.rounding(kind, spec)).double()
    quantizer.grid.initialize(levels, torch.as_tensor(scale, dtype=torch.float64))
    quantizer.set_progress(0.0)
    return quantizer


def data(levels, seed=0, shape=(4, 3, 7)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x.abs() if levels == "unsigned" else x).requires_grad_(), g


CASES = [
    (bits, levels, kind)
    for bits in range(1, 9)
    for levels, kind in (("unsigned", "activation"), ("signed", "weight"), ("symmetric", "weight"))
]


@pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
def test_lsq_equals_its_twin(bits, levels, kind):
    scale = 2.5 / 2**bits
    quantizer = make(LSQ(), kind, bits, levels, scale)
    x, g = data(levels)
    out = quantizer(x)
    out.backward(g)
    qmin, qmax, offset = F.code_range(bits, levels)
    count = x.numel() // (x.shape[0] if kind == "activation" else 1)
    vhat, dv, ds = lsq(x.flatten().tolist(), scale, -qmin, qmax, g.flatten().tolist(), count, offset)
    torch.testing.assert_close(out.flatten(), torch.tensor(vhat, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(dv, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert float(quantizer.grid.step.grad) == pytest.approx(ds, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_ewgs_with_bounds_equals_the_papers_form(bits, kind, delta):
    levels = "symmetric" if kind == "weight" else "unsigned"
    method = EWGS(grid_kind="bounds", rule="fixed", delta_weight=delta, delta_activation=delta)
    quantizer = make(method, kind, bits, levels, 2.0 / 2**bits)
    with torch.no_grad():  # bounds of their own, not symmetric ones
        quantizer.grid.lower.add_(0.05)
        quantizer.grid.upper.add_(0.11)
    x, g = data(levels)
    out = quantizer(x)
    out.backward(g)
    lower, upper = quantizer.grid.lower.item(), quantizer.grid.upper.item()
    xhat, dx, dl, du = ewgs(x.flatten().tolist(), lower, upper, bits, delta, g.flatten().tolist())
    # delta is a float32 constant in the module, hence 1e-8 where it enters.
    torch.testing.assert_close(out.flatten(), torch.tensor(xhat, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(dx, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert float(quantizer.grid.lower.grad) == pytest.approx(dl, rel=1e-7, abs=1e-8)
    assert float(quantizer.grid.upper.grad) == pytest.approx(du, rel=1e-7, abs=1e-8)


def run(quantizer, levels, seed=0):
    x, g = data(levels, seed)
    out = quantizer(x)
    quantizer.zero_grad()
    out.backward(g)
    return [out.detach(), x.grad, quantizer.grid.step.grad.clone()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestTemperingIdentities:
    """To the bit, at every bit width."""

    @pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
    @pytest.mark.parametrize("noise", ["none", "uniform", "rademacher", "gaussian", "toward_input", "on_grid"])
    def test_cold_and_without_delta_is_lsq(self, bits, levels, kind, noise):
        method = NoiseTempering(noise=noise, temperature=OFF, scale_on="none")
        expected = run(make(LSQ(), kind, bits, levels, 2.5 / 2**bits), levels)
        assert same(run(make(method, kind, bits, levels, 2.5 / 2**bits), levels), expected)

    @pytest.mark.parametrize(("bits", "levels", "kind"), CASES)
    def test_cold_with_delta_is_ewgs(self, bits, levels, kind):
        normalized = 0.2
        delta = normalized / (2**bits - 1)
        method = NoiseTempering(
            temperature=OFF, delta_rule="fixed", scale_on="both", delta_weight=delta, delta_activation=delta
        )
        peer = EWGS(rule="fixed", delta_weight=normalized, delta_activation=normalized)
        expected = run(make(peer, kind, bits, levels, 2.5 / 2**bits), levels)
        assert same(run(make(method, kind, bits, levels, 2.5 / 2**bits), levels), expected)

    @pytest.mark.parametrize("rule", ["fixed", "hessian", "gradient", "correlation"])
    def test_eval_is_the_hard_quantizer_at_any_temperature(self, rule):
        quantizer = make(NoiseTempering(delta_rule=rule, delta_weight=0.5), "weight", 2, "signed", 0.6).eval()
        quantizer.set_progress(0.0)
        x, _ = data("signed")
        expected = make(LSQ(), "weight", 2, "signed", 0.6).eval()(x)
        assert torch.equal(quantizer(x), expected)

    def test_the_temperature_reaches_zero_exactly_and_training_ends_as_lsq(self):
        quantizer = make(NoiseTempering(scale_on="none"), "weight", 2, "signed", 0.6)
        quantizer.set_progress(0.95)
        assert float(quantizer.rounding.temperature) == 0.0
        assert same(run(quantizer, "signed"), run(make(LSQ(), "weight", 2, "signed", 0.6), "signed"))


class TestTemperingNoise:
    DRAWS = 4000

    def test_function_transforms_give_the_same_gradient_and_change_nothing(self):
        quantizer = make(NoiseTempering(), "weight", 2, "signed", 0.6)
        x, g = data("signed")
        found = torch.func.grad(lambda t: (quantizer(t) * g).sum())(x.detach())
        assert not quantizer.rounding.delta.sums.any()
        each = torch.func.vmap(torch.func.grad(lambda t, h: (quantizer(t) * h).sum()))(x.detach()[None], g[None])
        quantizer(x).backward(g)
        assert torch.equal(found, x.grad)
        assert torch.equal(each[0], x.grad)

    def test_statistics_keep_no_graph_when_second_derivatives_are_wanted(self):
        quantizer = make(NoiseTempering(), "weight", 2, "signed", 0.6)
        x, g = data("signed")
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad((quantizer(x) * g).square().sum(), x, create_graph=True)
        sums = quantizer.rounding.delta.sums
        assert sums.any()
        assert not sums.requires_grad
        assert torch.isfinite(torch.autograd.grad(first.sum(), x)[0]).all()

    def test_a_rounding_of_two_quantizers_moves_once(self):
        one, two = (make(NoiseTempering(), "weight", 2, "signed", 0.6) for _ in range(2))
        two.rounding = one.rounding
        alone = make(NoiseTempering(), "weight", 2, "signed", 0.6)
        for model in (torch.nn.ModuleList([one, two]), alone):
            qtemper.set_progress(model, 0.25)
        assert torch.equal(one.rounding.temperature, alone.rounding.temperature)
        assert torch.equal(one.rounding.noise.key, alone.rounding.noise.key)

    @pytest.mark.parametrize("rule", ["fixed", "gradient"])
    @pytest.mark.parametrize("noise", ["uniform", "gaussian"])
    def test_values_stay_within_reach(self, noise, rule):
        method = NoiseTempering(noise=noise, delta_rule=rule, scale_on="both", delta_weight=1.95)
        rounding = make(method, "weight", 4, "signed", 1.0).rounding
        v = torch.linspace(-8, 7, 2_000_001)
        value = rounding(v).detach()
        assert 0.8 < float(max(value.max() - 7, -8 - value.min())) <= rounding.reach

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.5])
    @pytest.mark.parametrize("noise", ["uniform", "rademacher", "gaussian", "toward_input", "on_grid"])
    def test_values_of_any_temperature_stay_within_reach(self, noise, temperature):
        method = NoiseTempering(noise=noise, temperature=Constant(temperature), delta_rule="fixed", delta_weight=0.1)
        rounding = make(method, "weight", 4, "signed", 1.0).rounding
        value = rounding(torch.linspace(-8, 7, 1_000_001)).detach()
        assert -8 - rounding.reach <= value.min()
        assert value.max() <= 7 + rounding.reach
        assert not rounding.integral or torch.equal(value, torch.round(value))

    def draws(self, noise, temperature, v):
        """Mean and variance of the perturbed position over many steps, at one temperature."""
        method = NoiseTempering(noise=noise, temperature=Constant(temperature), scale_on="none")
        rounding = method.rounding("weight", QuantSpec(4))
        total, square = torch.zeros_like(v), torch.zeros_like(v)
        for step in range(self.DRAWS):
            rounding.set_progress(step / self.DRAWS)
            value = rounding(v).detach() - torch.round(v)
            total += value
            square += value**2
        mean = total / self.DRAWS
        return mean, square / self.DRAWS - mean**2

    @pytest.mark.parametrize("noise", ZERO_MEAN)
    def test_mean_is_the_code_and_variance_follows_the_error(self, noise):
        v = torch.linspace(-3.45, 3.45, 24, dtype=torch.float64)
        e, temperature = v - torch.round(v), 0.5
        mean, variance = self.draws(noise, temperature, v)
        error = temperature * e.abs() / math.sqrt(self.DRAWS)
        assert (mean.abs() <= 6 * error + 1e-12).all()
        # The relative error of a variance is sqrt((kurtosis - 1) / n); 3 bounds the kurtosis of all variants.
        expected = (temperature * e) ** 2
        assert ((variance - expected).abs() <= 6 * math.sqrt(2 / self.DRAWS) * expected + 1e-12).all()

    def test_on_grid_is_unbiased_stochastic_rounding_at_temperature_one(self):
        v = torch.linspace(-3.45, 3.45, 24, dtype=torch.float64)
        e = v - torch.round(v)
        mean, variance = self.draws("on_grid", 1.0, v)
        bound = 6 * (e.abs() * (1 - e.abs()) / self.DRAWS).sqrt()
        assert ((mean - e).abs() <= bound + 1e-12).all()
        assert ((variance - e.abs() * (1 - e.abs())).abs() <= 2 * bound + 1e-12).all()

    def test_toward_input_lies_between_code_and_input(self):
        rounding = NoiseTempering(noise="toward_input", temperature=Constant(1.0), scale_on="none").rounding(
            "weight", QuantSpec(4)
        )
        v = torch.linspace(-3.45, 3.45, 240, dtype=torch.float64)
        share = (rounding(v) - torch.round(v)) / (v - torch.round(v))
        assert (share > 0).all()
        assert (share < 1).all()

    @pytest.mark.parametrize("noise", ["uniform", "rademacher", "gaussian", "toward_input", "on_grid"])
    def test_there_is_none_on_grid_points(self, noise):
        rounding = NoiseTempering(noise=noise, temperature=Constant(1.0), scale_on="none").rounding(
            "weight", QuantSpec(4)
        )
        v = torch.arange(-8.0, 8.0)
        assert torch.equal(rounding(v), v)

    def test_noise_in_the_gradient_only_leaves_the_forward_hard(self):
        hard = make(LSQ(), "weight", 2, "signed", 0.6)
        method = NoiseTempering(noise_in="gradient", temperature=Constant(1.0), scale_on="none")
        quantizer = make(method, "weight", 2, "signed", 0.6)
        out, _, step = run(quantizer, "signed")
        expected, _, plain = run(hard, "signed")
        assert torch.equal(out, expected)
        assert not torch.equal(step, plain), "the step's gradient sees the noise"

    def test_noise_on_one_kind_only(self):
        method = NoiseTempering(noise_on="weights", scale_on="both")
        assert method.rounding("weight", QuantSpec(2)).noise is not None
        assert method.rounding("activation", QuantSpec(2)).noise is None


class TestDeltaRules:
    def test_gradient_rule_trains_delta_through_the_noise(self):
        method = NoiseTempering(delta_rule="gradient", delta_weight=0.5, temperature=Constant(1.0))
        quantizer = make(method, "weight", 4, "signed", 0.2)
        x, g = data("signed")
        out = quantizer(x)
        out.backward(g)
        # dL/ddelta = sum g * s * T * zeta * e, and out - s * q = s * T * delta * zeta * e.
        hard = quantizer.eval()(x.detach())
        expected = (g * (out.detach() - hard)).sum() / 0.5
        torch.testing.assert_close(quantizer.rounding.delta.value.grad[0], expected, rtol=1e-6, atol=1e-9)

    def test_gradient_rule_keeps_its_floor_and_ceiling(self):
        delta = NoiseTempering(delta_rule="gradient").rounding("weight", QuantSpec(4)).delta
        for raw in (-5.0, 0.0, 7.0):
            with torch.no_grad():
                delta.value.fill_(raw)
            assert 0 < float(delta()) < 2

    @pytest.mark.parametrize("noise", ZERO_MEAN)
    def test_correlation_finds_a_known_curvature(self, noise):
        """L = sum(h / 2 * y^2 + b * y) in bins has mean Hessian diagonal mean(h), and known gradients."""
        generator = torch.Generator().manual_seed(3)
        v = (torch.rand(20_000, generator=generator) * 14 - 7).double()
        h = torch.rand(20_000, generator=generator, dtype=torch.float64) * 2
        b = torch.randn(20_000, generator=generator, dtype=torch.float64) * 40
        method = NoiseTempering(noise=noise, temperature=Constant(1.0))
        rounding = method.rounding("weight", QuantSpec(4)).double()
        delta = rounding.delta
        assert isinstance(delta, CorrelationDelta)
        for step in range(300):
            rounding.set_progress(step / 300)
            y = rounding(v.clone().requires_grad_())
            (h / 2 * y**2 + b * y).sum().backward()
        rounding.set_progress(1.0)
        correlation, noise_energy = delta.averages[:2].tolist()
        # Each step's estimate has standard error std(g) * |eta| / eta^2; a hundred of them count in the average.
        error = 42 / math.sqrt(20_000 * 0.08 * 100)
        assert correlation / noise_energy == pytest.approx(1.0, abs=6 * error)
        g = h * torch.round(v) + b
        standard_error = math.sqrt(0.01 / 1.99) / (3 * math.sqrt(noise_energy))
        expected = correlation / noise_energy / (3 * float(g.std())) - 2 * standard_error
        assert float(delta()) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("elements", [432, 2304, 36864])
    def test_correlation_finds_nothing_where_there_is_no_curvature(self, elements):
        """A linear loss: whatever delta comes out is the estimator's own noise, which grows as the noise cools."""
        generator = torch.Generator().manual_seed(4)
        v = torch.rand(elements, generator=generator) * 3 - 2
        rounding = NoiseTempering().rounding("weight", QuantSpec(2))
        seen = []
        for step in range(600):
            rounding.set_progress(step / 600)
            (rounding(v.clone().requires_grad_()) * torch.randn(elements, generator=generator)).sum().backward()
            seen.append(float(rounding.delta()))
        # Without the two standard errors the mean is several hundredths, and single values reach 0.5.
        assert sum(seen) / len(seen) < 0.005
        assert seen[-1] < 0.01

    def test_hessian_rule_equals_ewgs_formula_on_a_quadratic(self):
        """The curvature of 1/2 sum h x_hat^2 with respect to x_hat, in bins, is s^2 h; the gradient s h x_hat."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(50, 40, bias=False)
        model = torch.nn.Sequential(layer)
        qtemper.prepare(model, EWGS(rule="hessian"), qtemper.BitPolicy(4, 32, "same"))
        qtemper.calibrate(model, [torch.eye(50)])

        def loss(net, x):
            return 1.7 * net(x).square().sum() / 2

        found = qtemper.update_curvature(model, [torch.eye(50)], loss, max_draws=4)
        scale = layer.weight_quantizer.grid.step.item()
        curvature = found["0.weight_quantizer"]
        assert curvature.mean_diagonal == pytest.approx(1.7 * scale**2, rel=1e-4)  # a diagonal H: no variance
        gradient = 1.7 * layer.weight.detach() * scale
        assert curvature.gradient_std == pytest.approx(float(gradient.std(correction=0)), rel=1e-4)
        delta = layer.weight_quantizer.rounding.delta
        assert float(delta()) == pytest.approx(curvature.mean_diagonal / (3 * curvature.gradient_std), rel=1e-4)

    def test_the_weight_of_a_layer_that_is_used_twice_has_one_hessian(self):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4, bias=False)
        model = torch.nn.Sequential(layer, layer)
        qtemper.prepare(model, EWGS(rule="hessian"), qtemper.BitPolicy(4, 32, "same"))
        x = torch.randn(64, 4)
        qtemper.calibrate(model, [x])
        found = qtemper.update_curvature(
            model, [x], lambda net, x: net(x).square().mean(), max_draws=2000, tolerance=0.0
        )["0.weight_quantizer"]
        weight, scale = layer.weight.detach(), layer.weight_quantizer.grid.step.item()

        def loss(w):
            return (x @ w.T @ w.T).square().mean()

        hessian = torch.autograd.functional.hessian(loss, weight).view(16, 16)
        assert found.mean_diagonal == pytest.approx(float(hessian.diagonal().mean()) * scale**2, rel=0.05)
        gradient = torch.autograd.functional.jacobian(loss, weight) * scale
        assert found.gradient_std == pytest.approx(float(gradient.std(correction=0)), rel=1e-3)

    def test_tensors_without_a_gradient_have_a_curvature(self):
        """A fixed input scale, a frozen layer; what did not run is left out."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        model[0].weight.requires_grad_(False)
        qtemper.prepare(model, "ewgs", qtemper.BitPolicy(4, 4, "8bit"))
        x = torch.randn(32, 6)
        qtemper.calibrate(model, [x])
        model[0].weight_quantizer.requires_grad_(False)
        found = qtemper.update_curvature(model, [x], lambda net, x: net(x).square().mean())
        assert len(found) == 4
        assert all(curvature.mean_diagonal > 0 for curvature in found.values())
        assert qtemper.update_curvature(model, [x], lambda net, x: net[2](x).sum()).keys() == {
            "2.weight_quantizer",
            "2.act_quantizer",
        }

    def test_a_linear_loss_has_no_curvature(self):
        torch.manual_seed(0)
        model = qtemper.prepare(torch.nn.Linear(6, 3), "ewgs", qtemper.BitPolicy(4, 32, "same"))
        x = torch.randn(32, 6)
        qtemper.calibrate(model, [x])
        (flat,) = qtemper.update_curvature(model, [x], lambda net, x: net(x).sum()).values()
        assert flat.mean_diagonal == 0
        assert flat.gradient_std > 0

    def test_statistics_survive_any_order_of_zeroing_and_clip_nothing(self):
        """They lie in a buffer: no optimizer, clipping or zero_grad sees them."""
        torch.manual_seed(0)
        model = qtemper.prepare(
            torch.nn.Sequential(torch.nn.Linear(30, 30)), "tempering", qtemper.BitPolicy(2, 2, "same")
        )
        qtemper.calibrate(model, [torch.randn(64, 30)])
        plain = {n for n, _ in model.named_parameters()}
        assert plain == {"0.weight", "0.bias", "0.weight_quantizer.grid.step", "0.act_quantizer.grid.step"}
        scheduler = qtemper.Tempering(model, 10)
        model(torch.randn(64, 30)).square().mean().backward()
        model.zero_grad()
        scheduler.step()
        delta = model[0].weight_quantizer.rounding.delta
        assert float(delta.averages[4]) == pytest.approx(9.0)  # 900 elements, weighted 1 - 0.99
        assert not delta.sums.any()

    def test_rules_that_need_noise_say_so(self):
        with pytest.raises(ValueError, match="zero-mean noise"):
            NoiseTempering(noise="on_grid")
        with pytest.raises(ValueError, match="nothing to scale"):
            NoiseTempering(noise="none", delta_rule="gradient")
        for rule in ("correlation", "gradient"):
            with pytest.raises(ValueError, match="sees none"):
                NoiseTempering(noise_in="gradient", delta_rule=rule)
        for given in ({}, {"delta_activation": 0.1}, {"scale_on": "activations", "delta_weight": 0.1}):
            with pytest.raises(ValueError, match="has no constant"):
                NoiseTempering(delta_rule="fixed", **given)
        with pytest.warns(UserWarning, match="stays constant"):
            NoiseTempering(noise_on="activations")

    def test_an_ablation_is_one_recipe_with_one_field_changed(self):
        base = {"temperature": Constant(0.5), "delta_weight": 0.1}
        steps = [
            NoiseTempering(noise="none", scale_on="none", **base),
            NoiseTempering(noise="none", delta_rule="fixed", **base),
            NoiseTempering(scale_on="none", **base),
            NoiseTempering(delta_rule="fixed", **base),
        ]
        results = [run(make(m, "weight", 2, "signed", 0.6), "signed") for m in steps]
        assert same(results[0], run(make(LSQ(), "weight", 2, "signed", 0.6), "signed"))
        assert len({tuple(r[1].flatten().tolist()) for r in results}) == 3  # noise alone keeps the plain dL/dx
        assert len({tuple(r[0].flatten().tolist()) for r in results}) == 2


def test_uniform_noise_has_the_variance_of_a_bin():
    quantizer = make(qtemper.get_method("noise"), "weight", 4, "signed", 0.3)
    x = (torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 3
    noise = (quantizer(x).detach() - x) / 0.3
    assert float(noise.abs().max()) <= 0.5 + 1e-6
    assert float(noise.var()) == pytest.approx(1 / 12, rel=0.02)
    on_a_code = torch.tensor([0.0, 0.3, -0.6, 100.0, -100.0], dtype=torch.float64)
    assert torch.equal(quantizer(on_a_code), quantizer.eval()(on_a_code))


def test_a_fixed_grid_learns_nothing():
    quantizer = make(qtemper.get_method("ste"), "weight", 4, "signed", 0.3)
    assert list(quantizer.parameters()) == []


def test_the_folder_is_the_registry():
    for name in qtemper.methods_available():
        assert method_class(name).name == name
        assert method_class(name).__module__ == f"qtemper.methods.{name}"
