"""What every method must do, for every kind of tensor, bit width and dtype. A new method is covered by its name."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx

import qtemper
from qtemper.calibrate import search_scale
from qtemper.counter import NoiseSource
from qtemper.functional import code_range
from qtemper.methods.ewgs import EWGS
from qtemper.quantizer import Quantizer, QuantSpec, quantizers

METHODS = qtemper.methods_available()
KINDS = ("weight", "activation")
BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16)


def sample(kind, dtype=torch.float32, seed=0):
    x = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(seed))
    return (x if kind == "weight" else x.relu()).to(dtype)


def build(method, kind, bits, x=None, axis=None):
    """A calibrated quantizer in training mode, in the middle of its training."""
    method = qtemper.get_method(method) if isinstance(method, str) else method
    x = sample(kind) if x is None else x
    spec = QuantSpec(bits, method.default_levels(kind), axis)
    channels = 1 if axis is None else x.shape[axis]
    quantizer = Quantizer(spec, method.grid(kind, spec, channels), method.rounding(kind, spec))
    levels = spec.resolve(has_negative=kind == "weight")
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(channels, -1)
    scale = search_scale(rows.float(), code_range(bits, levels), "mse")
    quantizer.grid.initialize(levels, scale if axis is not None else scale[0])
    for module in quantizer.modules():
        if isinstance(module, NoiseSource):
            module.seed(0, kind)
    quantizer.set_progress(0.3)
    return quantizer


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
class TestQuantizer:
    def test_eval_is_the_hard_quantizer_to_the_bit(self, method, kind, bits, dtype):
        x = sample(kind, dtype)
        quantizer = build(method, kind, bits).eval()
        codes = quantizer.codes(x)
        qmin, qmax, zero_point = quantizer.grid.limits
        assert codes.min() >= qmin
        assert codes.max() <= qmax
        if quantizer.grid.has_offset:  # the zero point is no number of the grid
            expected = quantizer.grid.decode(codes.float(), codes.float(), x.float())
        else:
            expected = (codes.float() - zero_point) * quantizer.grid.scale(x.float())
        assert torch.equal(quantizer(x), expected.to(dtype))
        # RAND's scale leaves out the lowest code of a signed grid.
        assert bits > 2 or len(codes.unique()) == 2**bits - (method == "rand" and kind == "weight" and bits == 2)

    def test_keeps_shape_and_dtype_and_has_finite_gradients(self, method, kind, bits, dtype):
        x = sample(kind, dtype).requires_grad_()
        quantizer = build(method, kind, bits)
        x_hat = quantizer(x)
        assert x_hat.shape == x.shape
        assert x_hat.dtype == dtype
        x_hat.float().square().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().sum() > 0
        for name, parameter in quantizer.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    def test_same_seed_and_progress_same_output_and_eval_changes_nothing(self, method, kind, bits, dtype):
        x = sample(kind, dtype)
        first, second = build(method, kind, bits), build(method, kind, bits)
        before = {k: v.clone() for k, v in first.state_dict().items()}
        first.eval()(x)
        assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())
        assert torch.equal(first.train()(x), second(x))
        assert torch.equal(first(x), second(x)), "a second call in the same step draws the same noise"

    def test_survives_state_dict_deepcopy_and_pickle(self, method, kind, bits, dtype):
        x = sample(kind, dtype)
        quantizer = build(method, kind, bits)
        expected = quantizer(x)
        fresh = build(method, kind, bits, x=2 * sample(kind))
        keys = list(fresh.state_dict())
        fresh.load_state_dict(quantizer.state_dict())
        assert list(fresh.state_dict()) == keys
        for twin in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert torch.equal(twin(x), expected)
            twin.set_progress(0.7)
            quantizer.set_progress(0.7)
            assert torch.equal(twin(x), quantizer(x))
            quantizer.set_progress(0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_per_channel_equals_per_tensor_on_each_channel(method, kind):
    x = sample(kind)
    whole = build(method, kind, 4, axis=1).eval()
    out = whole(x)
    for channel in range(x.shape[1]):
        part = x[:, channel : channel + 1]
        assert torch.equal(build(method, kind, 4, x=part).eval()(part), out[:, channel : channel + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_scales_stay_positive_whatever_the_optimizer_does(method, kind):
    quantizer = build(method, kind, 2)
    with torch.no_grad():
        for parameter in quantizer.grid.parameters():
            parameter.fill_(-1.0)
    x = sample(kind).requires_grad_()
    assert (quantizer.grid.scale(x) > 0).all()
    quantizer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("method", [*METHODS, EWGS(rule="fixed", delta_weight=0.5, delta_activation=0.5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_a_finite_difference_of_itself(method, kind):
    """Second derivatives: the gradient map (x, g) -> dL/dx, differentiated, agrees with central differences.

    Away from bin edges and bounds, where the map is smooth; float64, so the tolerance is that of the difference.
    """
    quantizer = build(method, kind, 2).double()
    x = sample(kind, torch.float64)
    with torch.no_grad():
        v = quantizer.grid.encode(x)
        position = v - torch.floor(v)
        qmin, qmax, _ = quantizer.grid.limits
        smooth = ((position - 0.5).abs() > 0.02) & (v > qmin + 0.02) & (v < qmax - 0.02)
    x = x[smooth][:20].detach()
    gradient = torch.linspace(-2.0, 2.0, len(x), dtype=torch.float64) + 0.01

    def vjp(inputs, g):
        (out,) = torch.autograd.grad(quantizer(inputs), inputs, g, create_graph=True)
        return out

    x.requires_grad_()
    gradient.requires_grad_()
    first = vjp(x, gradient)
    weights = torch.cos(torch.arange(len(x), dtype=torch.float64))
    analytic = torch.autograd.grad((first * weights).sum(), (x, gradient), allow_unused=True, materialize_grads=True)
    step = 1e-5
    for which in range(2):
        numeric = torch.zeros_like(x)
        for i in range(len(x)):
            values = []
            for sign in (1, -1):
                moved = [x.detach().clone(), gradient.detach().clone()]
                moved[which][i] += sign * step
                values.append((vjp(moved[0].requires_grad_(), moved[1]) * weights).sum())
            numeric[i] = (values[0] - values[1]).detach() / (2 * step)
        torch.testing.assert_close(analytic[which], numeric, rtol=1e-5, atol=1e-6)


def test_the_input_gradient_does_not_depend_on_the_step(method):
    """Inside the range dL/dx is a function of the gradient and the error; its derivative by the step must say so."""
    quantizer = build(method, "weight", 4).double()
    parameters = list(quantizer.grid.parameters())
    if not parameters:
        return
    quantizer.eval()  # without noise and scaling: dL/dx = g
    x = sample("weight", torch.float64).requires_grad_()
    g = torch.ones_like(x, requires_grad=True)
    (dx,) = torch.autograd.grad(quantizer(x), x, g, create_graph=True)
    mixed = torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    assert all(torch.equal(m, torch.zeros_like(m)) for m in mixed)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def prepared(method, policy="W2A2"):
    policy = qtemper.BitPolicy.parse(policy)
    model = qtemper.prepare(small_network(), method, qtemper.BitPolicy(policy.weight, policy.activation, "same"))
    return qtemper.calibrate(model, [batch()])


def batch():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_everything_exists_at_construction(method):
    model = qtemper.prepare(small_network(), method, "W2A2")
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    qtemper.calibrate(model, [batch()])
    qtemper.set_progress(model, 0.5)
    model(batch()).sum().backward()
    assert list(model.state_dict()) == keys
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert [id(p) for p in model.parameters()] == parameters


def test_float_state_dict_loads_strictly_and_a_quantized_one_too(method):
    source = prepared(method)
    model = qtemper.prepare(small_network(), method, qtemper.BitPolicy(2, 2, "same"))
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.eval()(batch()), source.eval()(batch()))
    model.load_state_dict(small_network().state_dict())
    with pytest.raises(qtemper.NotCalibratedError):
        model(batch())


def test_a_checkpoint_of_other_bits_is_refused(method):
    source, target = prepared(method, "W8A8"), prepared(method, "W2A2")
    with pytest.raises(RuntimeError, match="not those of 2 bits"):
        target.load_state_dict(source.state_dict())


def test_a_prepared_model_can_be_wrapped_before_calibration(method):
    model = qtemper.prepare(small_network(), method, "W2A2")
    qtemper.calibrate(nn.ModuleDict({"backbone": model}), [batch()], forward=lambda m, x: m["backbone"](x))
    model(batch())


def test_weights_can_be_read_and_set_before_calibration(method):
    model = qtemper.prepare(small_network(), method, "W2A2")
    layer = model[3]
    assert torch.equal(layer.weight, layer.latent_weight)
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    assert torch.equal(layer.latent_weight, torch.ones_like(layer.weight))


@pytest.mark.slow
def test_compiles_with_dynamic_shapes(method):
    torch._dynamo.reset()
    model = prepared(method)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 5, 3):
        compiled(batch()[:size]).sum().backward()


def test_model_survives_deepcopy_and_torch_save(method):
    model = prepared(method)
    expected = model(batch())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(batch()), expected)


@pytest.mark.slow
def test_compiles_in_one_graph_and_once_for_all_temperatures(method):
    torch._dynamo.reset()
    model = prepared(method)
    eager = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(4):
        for each in (model, eager):
            qtemper.set_progress(each, step / 3)
        out, expected = compiled(batch()), eager(batch())
        # Fused kernels may contract a multiply and an add, which can move a value over a bin edge; not in this batch,
        # but NIPQ's histogram has 256 edges in each bin, and a draw moves by one or a few of them.
        close = 1e-2 if method == "nipq" else 1e-4
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=close)
        out.square().mean().backward()
        expected.square().mean().backward()
    assert len(graphs) == 1
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=close, msg=lambda m, n=name: f"{n}: {m}")


def test_runs_under_autocast_and_activation_checkpointing(method):
    model = prepared(method)
    x = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    plain = copy.deepcopy(model)
    plain[3](x[:, :1].expand(-1, 4, -1, -1)).sum().backward()
    torch.utils.checkpoint.checkpoint(
        model[3], x[:, :1].expand(-1, 4, -1, -1).requires_grad_(), use_reentrant=False
    ).sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_quantizers_told_together_are_as_quantizers_told_one_by_one(method):
    model = prepared(method)
    twin = copy.deepcopy(model)
    for step in range(3):
        qtemper.set_progress(model, step / 4)
        for _, quantizer in quantizers(twin):
            quantizer.set_progress(step / 4)
        for each in (model, twin):
            each(batch()).square().mean().backward()
        for (name, own), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(own, other), name
