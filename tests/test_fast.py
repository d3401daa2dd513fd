"""The fast path computes what the plain forward computes: exactly on codes, and with the same gradients."""

import copy
import math
import os
import platform
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qtemper
from qtemper import fast
from qtemper.counter import NoiseSource
from qtemper.fast import blocks, convolution, integer, norm, packing, plan, relu
from qtemper.fast import layer as fast_layer
from qtemper.fast.integer import Geometry, convolve_codes, is_exact
from qtemper.fast.replace import replace_float_layers
from qtemper.methods.ewgs import EWGS
from qtemper.methods.tempering import NoiseTempering

METHODS = {
    "ste": "ste",
    "lsq": "lsq",
    "ewgs": EWGS(rule="fixed", delta_weight=0.5, delta_activation=0.5),
    "on_grid": NoiseTempering(noise="on_grid", delta_rule="fixed", delta_weight=0.3),
    "in_gradient": NoiseTempering(noise_in="gradient", scale_on="none"),
}
NOISY = {"tempering": "tempering", "noise": "noise", "gradient": NoiseTempering(delta_rule="gradient")}
LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (5, 6, 7, 7)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, bias=False), (5, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (5, 6, 7, 7)),
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "gray": (lambda: nn.Conv2d(1, 8, 3, padding=1), (5, 1, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (5, 6, 7, 7)),
}


@pytest.fixture(autouse=True)
def restore():
    yield
    fast.use_fast_path(True)
    torch._dynamo.reset()  # it gives up on code that many tests compile


def make(kind="conv", method="lsq", bits="W4A4", *, signed=False, granularity="tensor"):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(shape)
    x = x if signed else x.relu()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    rules = (qtemper.Rule("*", weight_granularity=granularity),)
    qtemper.prepare(layer, method, qtemper.BitPolicy(*_bits(bits), first_last="same", rules=rules))
    qtemper.calibrate(layer, [x])
    layer.train()
    qtemper.set_progress(layer, 0.2)
    return layer, x


def run(layer, x, *, enabled):
    """Output and all gradients."""
    fast.use_fast_path(enabled)
    layer.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(leaf)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weights).sum().backward()
    return out.detach(), {"input": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.parametrize("extreme", [True, False])
@pytest.mark.parametrize("x_range", [(255, 0), (255, 128), (15, 8), (1, 0)], ids=str)
@pytest.mark.parametrize("w_range", [(-128, 127), (-127, 127), (-8, 7), (-1, 1)], ids=str)
@pytest.mark.parametrize(
    "geometry", [((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 2), (1, 2), 2), ((1, 1), (1, 1), (1, 1), 64)]
)
def test_convolution_of_codes_is_int64_accumulation(extreme, x_range, w_range, geometry):
    geometry = Geometry(*geometry)
    x_max, zero_point = x_range
    shape = (64, 64 // geometry.groups, 3, 3)
    if not is_exact(x_max, zero_point, *w_range, shape, geometry):
        fits_16_bits = 2 * x_max * max(-w_range[0], w_range[1]) < 2**15
        assert not (fits_16_bits and platform.machine() == "x86_64"), "no x86 CPU saturates here"
        pytest.skip("this CPU's 8-bit products saturate for these ranges: the float convolution is used instead")
    generator = torch.Generator().manual_seed(1)

    def draw(low, high, shape):
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        return torch.where(drawn * 2 > low + high, high, low) if extreme else drawn

    x = draw(0, x_max, (2, 64, 6, 6)).contiguous(memory_format=torch.channels_last)
    w = draw(*w_range, shape)
    scale = torch.rand(64, generator=generator)
    found = convolve_codes(x.to(torch.uint8), w.to(torch.int8), scale, zero_point, geometry)
    # float64 holds every sum of int64 products here: they stay below 2**53.
    sums = nn.functional.conv2d((x - zero_point).double(), w.double(), None, *geometry)
    assert torch.equal(found, sums.float() * scale[:, None, None])


def test_weights_are_packed_for_the_zero_point_where_packing_for_0_fails(monkeypatch):
    x = torch.randint(0, 16, (2, 6, 7, 7), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    w = torch.randint(-8, 8, (8, 6, 3, 3), dtype=torch.int8)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    expected = convolve_codes(x, w, torch.ones(1), 3, geometry)
    prepack, tried = torch.ops.onednn.qconv_prepack, []

    def picky(w, scale, x_scale, zero_point, *rest):
        tried.append(zero_point)
        if not zero_point:
            raise RuntimeError("could not create a primitive descriptor for a reorder primitive")
        return prepack(w, scale, x_scale, zero_point, *rest)

    monkeypatch.setattr(torch.ops.onednn, "qconv_prepack", picky)
    assert torch.equal(convolve_codes(x, w, torch.ones(1), 3, geometry), expected)
    assert tried == [0, 3]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", ["W1A1", "W2A2", "W4A4", "W8A8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [False, True])
def test_same_output_and_gradients_as_the_plain_forward(kind, bits, method, signed):
    layer, x = make(kind, METHODS[method], bits, signed=signed)
    plain, expected = run(layer, x, enabled=False)
    out, found = run(layer, x, enabled=True)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)  # float sums are rounded, sums of codes are not
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_scales_per_channel():
    layer, x = make(granularity="channel")
    torch.testing.assert_close(run(layer, x, enabled=True)[0], run(layer, x, enabled=False)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", ["W2A2", "W4A4", "W8A8"])
@pytest.mark.parametrize("method", NOISY)
def test_noise_is_moved_by_less_than_one_step_of_the_finer_grid(kind, bits, method):
    layer, x = make(kind, NOISY[method], bits)
    with torch.no_grad():
        for quantizer, tensor, signed in (
            (layer.act_quantizer, x, False),
            (layer.weight_quantizer, layer.latent_weight, True),
        ):
            finer = packing.packing_of(quantizer, signed=signed)
            assert (finer is None) == (bits == "W8A8")
            moved, _ = packing.quantize(quantizer, finer, tensor)
            step = float(quantizer.grid.scale(tensor)) * (0 if finer is None else 1 / finer.steps)
            assert (moved - quantizer(tensor)).abs().max() <= step * 1.001
    plain, _ = run(layer, x, enabled=False)
    out, gradients = run(layer, x, enabled=True)
    assert (out - plain).square().mean() < 0.02 * plain.square().mean()
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_noise_keeps_its_mean_and_variance_on_the_finer_grid():
    source = NoiseSource()
    source.seed(0, "here")
    x = torch.full((2000, 500), 0.3)
    value = 4.2 + 0.1 * (source(x) - 0.5)
    finer = packing.Packing(0.0, 12, 12, 0, 204, integral=False, noisy=True)
    moved = finer.unpack(finer.pack(value, source), value).double()
    count = value.numel()
    # Standard errors of a mean: at most half a step in each of 1e6 draws.
    assert abs(float(moved.mean() - value.double().mean())) < 4 * (1 / 24) / count**0.5 + 1 / (512 * 12 * 2)
    # Stochastic rounding adds at most (step / 2)**2.
    assert float(value.double().var()) < float(moved.var()) < float(value.double().var()) + (1 / 24) ** 2
    codes = torch.arange(15.0)
    assert torch.equal(finer.unpack(finer.pack(codes, source), codes), codes)


@pytest.mark.parametrize("zero_point", [0.0, -0.5])
def test_codes_stay_where_they_are_on_every_finer_grid(zero_point):
    source = NoiseSource()
    for steps in set(range(8, packing.MAX_STEPS + 1)) - set(packing.INEXACT):
        if zero_point and steps % 2:
            continue
        codes = torch.arange(-(120 // steps), 120 // steps).float()
        finer = packing.Packing(zero_point, steps, 120, 0, 255, integral=False, noisy=True)
        assert torch.equal(finer.unpack(finer.pack(codes, source), codes), codes), steps


@pytest.mark.parametrize("method", [*METHODS, *NOISY])
def test_blocks_do_not_show(method, monkeypatch):
    layer, x = make("conv", (METHODS | NOISY)[method])
    out, gradients = run(layer, x, enabled=True)
    monkeypatch.setattr(blocks, "BLOCK", 2 * x[0].numel())
    again, others = run(layer, x, enabled=True)
    assert torch.equal(out, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)  # sums over blocks


@pytest.mark.parametrize("method", [*METHODS, *NOISY])
def test_keeps_nothing_but_its_float_input(method):
    layer, x = make("conv", (METHODS | NOISY)[method])
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    assert kept
    assert kept.keys() <= own


@pytest.mark.parametrize("bits", ["W4A4", "W8A8"])
def test_a_cpu_whose_products_saturate_uses_the_float_convolution(bits, monkeypatch):
    layer, x = make(bits=bits)
    exact, _ = run(layer, x, enabled=True)
    monkeypatch.setattr(integer, "_tried", lambda *_: False)
    monkeypatch.setattr(blocks, "convolve_integers", None)
    out, _ = run(layer, x, enabled=True)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def second_derivatives(layer, x, *, enabled):
    fast.use_fast_path(enabled)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    wanted = [leaf, *layer.parameters()]
    value = layer(leaf).square().square().sum()
    first = torch.autograd.grad(value, wanted, create_graph=True)
    return torch.autograd.grad(sum((g * g).sum() for g in first), wanted, allow_unused=True)


@pytest.mark.parametrize("method", ["lsq", "ewgs", "on_grid"])
def test_second_derivatives_are_those_of_the_plain_forward(method):
    layer, x = make("conv", METHODS[method])
    # EWGS scales by the sign of g: of two gradients that plain autograd adds up first, the fast path scales each.
    close = 1e-2 if method == "ewgs" else 1e-3
    both = [second_derivatives(layer, x, enabled=enabled) for enabled in (True, False)]
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["conv", "gray", "pointwise"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_lies_in_memory_as_the_float_layers(w_format, x_format, compiled, kind):
    layer, x = make(kind)
    layer, x = layer.to(memory_format=w_format), x.to(memory_format=x_format)
    expected = nn.functional.conv2d(x, layer.latent_weight, layer.bias, padding=layer.padding)
    torch._dynamo.reset()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x) if compiled else layer(x)
    assert out.stride() == expected.stride()


def test_a_parameter_of_both_quantizers_gets_its_gradient_once():
    layer, x = make()
    layer.weight_quantizer.grid.step = layer.act_quantizer.grid.step
    _, gradients = run(layer, x, enabled=True)
    _, expected = run(layer, x, enabled=False)
    torch.testing.assert_close(gradients, expected)
    both = [second_derivatives(layer, x, enabled=enabled) for enabled in (True, False)]
    for found, wanted in zip(*both, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_layer_that_is_used_twice_counts_each_use_once(create_graph):
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    qtemper.prepare(layer, "lsq", qtemper.BitPolicy(4, 4, first_last="same"))
    qtemper.calibrate(layer, [x])
    layer.train()

    def gradients(enabled):
        fast.use_fast_path(enabled)
        return torch.autograd.grad(layer(layer(x)).square().sum(), [*layer.parameters()], create_graph=create_graph)

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-4)


def test_functional_call_gives_the_gradient_of_what_it_was_called_with():
    layer, x = make()

    def gradients(enabled):
        fast.use_fast_path(enabled)
        others = {name: (1.5 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
        torch.func.functional_call(layer, others, x).square().sum().backward()
        return {name: p.grad for name, p in others.items()}

    before = {name: p.clone() for name, p in layer.named_parameters()}
    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-3)
    assert all(p.grad is None and isinstance(p, nn.Parameter) for p in layer.parameters())
    torch.testing.assert_close(dict(layer.named_parameters()), before)


def test_a_batch_of_no_images_has_a_gradient_of_none(monkeypatch):
    monkeypatch.setattr(plan, "packing_of", lambda *_, **__: None)
    layer, x = make()
    empty = x[:0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(empty).sum(), empty)
    assert grad.shape == empty.shape


@pytest.mark.parametrize("method", ["lsq", "tempering"])
def test_a_linear_layer_is_a_product_of_matrices_where_there_are_no_integers(method, monkeypatch):
    monkeypatch.setattr(plan, "packing_of", lambda *_, **__: None)  # as on a GPU
    layer, x = make("linear", method)
    out, gradients = run(layer, x, enabled=True)
    plain, expected = run(layer, x, enabled=False)
    assert torch.equal(out, plain)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, (1, 1), (1, 1)), (3, (2, 1), (0, 2)), (1, (2, 2), (0, 0)), ((1, 7), (1, 1), (0, 0))],
)
@pytest.mark.parametrize("wanted", [(True, True), (False, True)], ids=str)
def test_the_weights_gradient_as_a_product(kernel, stride, padding, wanted, monkeypatch):
    monkeypatch.setattr(convolution, "AMX", True)
    memory = {"memory_format": torch.channels_last}
    x = torch.randn(3, 128, 7, 7).bfloat16().contiguous(**memory)
    w = (
        torch.randn(130, 128, *(kernel if isinstance(kernel, tuple) else (kernel, kernel)))
        .bfloat16()
        .contiguous(**memory)
    )
    grad = torch.randn_like(torch.conv2d(x, w, None, stride, padding))
    layer = convolution.Convolution(Geometry(stride, padding, (1, 1), 1), False, True, torch.bfloat16)
    assert convolution._weight_gradient_is_a_product(grad, x, w.shape[2:], layer)
    found = convolution.convolve_backward(grad, x, w, layer, wanted)
    monkeypatch.setattr(convolution, "AMX", False)
    expected = convolution.convolve_backward(grad, x, w, layer, wanted)
    assert found[1].stride() == w.stride()
    torch.testing.assert_close(found[1], expected[1], rtol=2**-6, atol=2**-6 * float(expected[1].abs().max()))
    assert (found[0] is None and expected[0] is None) or torch.equal(found[0], expected[0])


def test_hooks_on_a_quantizer_and_a_forward_of_its_own_get_the_plain_forward():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias) + 1

    layer, x = make()
    assert fast_layer.supported(layer, x)
    assert not fast_layer.supported(layer, x.double())
    seen = []
    layer.act_quantizer.register_forward_hook(lambda *_: seen.append(1))
    assert not fast_layer.supported(layer, x)
    layer(x)
    assert seen
    own = qtemper.prepare(Own(6, 8, 3), "lsq", qtemper.BitPolicy(4, 4, first_last="same"))
    qtemper.calibrate(own, [x])
    assert not fast_layer.supported(own, x)


def test_noise_drawn_anew_before_the_backward_pass_is_an_error():
    layer, x = make(method="tempering")
    out = layer(x).sum()
    qtemper.set_progress(layer, 0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("method", ["lsq", "tempering"])
def test_autocast(method):
    layer, x = make(method=method)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = run(layer, x, enabled=True)
        plain, expected = run(layer, x, enabled=False)
    assert out.dtype == plain.dtype == torch.bfloat16
    # bfloat16 has 8 bits; noise moves by a step of the finer grid.
    tolerance = 0.02 if method == "lsq" else 0.2
    torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "on_grid"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_have_the_losses_of_the_plain_path(method, compiled):
    """Sums of codes and of floats differ in the last bits; where that moves a value over the edge of its bin, a code
    changes. In 50 steps of a small network that grows to a few thousandths of the loss, as it does between one and two
    threads of the plain path."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 3, 12, 12), torch.randint(0, 10, (64,))
    qtemper.prepare(model, METHODS[method], "W4A4")
    qtemper.calibrate(model, [x])
    model.train()

    def losses(model, enabled):
        fast.use_fast_path(enabled)
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True) if compiled and enabled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        found = []
        for step in range(50):
            qtemper.set_progress(model, step / 50)
            loss = nn.functional.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    plain, found = losses(copy.deepcopy(model), False), losses(copy.deepcopy(model), True)
    assert plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0)


def _bits(text):
    weight, act = text[1:].split("A")
    return int(weight), int(act)


@pytest.mark.parametrize("size", [(3, 2, 1), (2, None, 0)])
def test_compiled_pooling_is_torchs(size):
    kernel, stride, padding = size
    pool = torch.nn.Sequential(torch.nn.MaxPool2d(kernel, stride, padding))
    x = torch.randn(2, 5, 11, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = pool(x)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    replace_float_layers(pool)
    assert torch.equal(pool(x), expected)
    out = torch.compile(pool, fullgraph=True)(x)
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], expected_grad)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_relu_is_torchs(inplace, dtype):
    """Its input read afterwards too, which a ReLU in place has changed."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace)

        def forward(self, x):
            y = x * 2
            return self.relu(y) + y

    plain = Twice()
    numbers = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1e-30, 1.0, math.inf, math.nan], dtype=dtype)
    x = numbers.repeat_interleave(len(numbers)).requires_grad_()
    grad = numbers.repeat(len(numbers))
    expected = plain(x)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    quick = copy.deepcopy(plain)
    replace_float_layers(quick)
    assert type(quick.relu) is relu.ReLU
    for call in (quick, torch.compile(quick, fullgraph=True)):
        out = call(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        (found,) = torch.autograd.grad(out, x, grad)
        torch.testing.assert_close(found, expected_grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("noise", ["uniform", "on_grid"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_codes_of_half_precision_are_those_of_eager_steps(noise, channels_last):
    method = NoiseTempering(noise=noise, delta_rule="fixed", delta_weight=0.1)
    layer, x = make(method=method)
    x = x.detach().bfloat16()
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    act = layer.act_quantizer
    packed = packing.packing_of(act, signed=False)
    x_hat, codes = packing.quantize(act, packed, x)
    found_x_hat, found = torch.compile(partial(packing.quantize, act, packed, half=True), fullgraph=True)(x)
    assert torch.equal(codes, found)
    assert torch.equal(x_hat, found_x_hat)
    assert found.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_compiled_batch_norm_is_torchs(mean, dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(5, momentum=0.3), nn.BatchNorm2d(5, track_running_stats=False))
    with torch.no_grad():
        for layer in plain:
            layer.weight.uniform_(-2, 2)
            layer.bias.uniform_(-2, 2)
    quick, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    replace_float_layers(quick)
    assert all(type(layer) is norm.BatchNorm2d for layer in quick)
    # Far from zero, bfloat16 holds two numbers in a standard deviation, to which all of this is exact again.
    x = (mean + torch.randn(6, 5, 7, 9)).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(6, 5, 7, 9).to(dtype).contiguous(memory_format=torch.channels_last)

    def step(model, call, cast):
        leaf = x.detach().to(cast).requires_grad_()
        out = call(leaf)
        out.backward(grad.to(cast))
        assert out.is_contiguous(memory_format=torch.channels_last)
        return [out.detach(), leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    found = step(quick, torch.compile(quick, fullgraph=True), dtype)
    reference, expected = step(exact, exact, torch.float64), step(plain, plain, dtype)
    assert quick[0].num_batches_tracked == 1
    for ours, theirs, true in zip(found, expected, reference, strict=True):
        assert ours.dtype == theirs.dtype
        # Rounding is torch's own, give or take: of an input at 300 the float32 mean alone is off by 1e-5.
        slack = 1e-5 * (1 + mean / 30) if dtype == torch.float32 else 2e-2
        error = (ours.double() - true).abs().max()
        assert error <= 4 * (theirs.double() - true).abs().max() + slack * (1 + true.abs().max())


def test_compiled_batch_norm_of_any_size_is_torchs():
    plain = nn.Sequential(nn.BatchNorm2d(5))
    quick = copy.deepcopy(plain)
    replace_float_layers(quick)
    compiled = torch.compile(quick, dynamic=True, fullgraph=True)
    for samples, height in ((4, 6), (6, 8)):
        x = torch.randn(samples, 5, height, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn_like(x)
        expected, found = plain(x), compiled(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad))
    torch.testing.assert_close(quick.state_dict(), plain.state_dict())


def test_compiled_batch_norm_does_as_its_settings_say():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    untracked, unbiased = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    untracked.track_running_stats = False
    unbiased.bias = None
    for layer in (untracked, unbiased):
        quick = nn.Sequential(copy.deepcopy(layer))
        replace_float_layers(quick)
        torch.testing.assert_close(torch.compile(quick)(x), layer(x))
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(quick[0].get_buffer(name), buffer)
    other = nn.Sequential(nn.BatchNorm2d(5))
    replace_float_layers(other)
    with pytest.raises(Exception, match="should contain"):
        torch.compile(other)(x[:, :1])


def test_batch_norm_of_one_number_is_torchs_error():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    replace_float_layers(layer)
    x = torch.randn(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    with pytest.raises(Exception, match="more than 1 value per channel"):
        torch.compile(layer)(x)


@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_nan_does_not_become_an_integer(kind, where):
    layer, x = make(kind)
    tensor = x if where == "input" else layer.latent_weight.data
    tensor[(1,) * tensor.dim()] = torch.nan
    for training in (False, True):
        layer.train(training)
        assert run(layer, x, enabled=False)[0].isnan().any()
        out, gradients = run(layer, x, enabled=True)
        # A step's own forward is spared the pass over its input: the gradients say it.
        seen = gradients["weight"] if training and where == "input" else out
        assert seen.isnan().any()


def test_a_layer_is_traced_with_fake_tensors_without_having_run():
    integer._tried.cache_clear()
    layer, x = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer.eval()(mode.from_tensor(x)).shape == (5, 8, 7, 7)


def test_a_dtype_that_the_float_layer_refuses_is_refused():
    layer, x = make()
    with pytest.raises(RuntimeError, match="dtype|type"):
        layer.eval()(x.bfloat16())


@pytest.mark.parametrize("method", ["lsq", "tempering"])
def test_a_compiled_network_is_found_again(method, tmp_path, monkeypatch):
    if not hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
        pytest.skip("torch before 2.7 keeps no graph with autograd functions")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, x = make("conv", method)
    results = []
    for hits in (0, 1):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        layer.zero_grad()
        with fast.cached_compilation():
            out = torch.compile(layer, fullgraph=True)(x)
        out.square().sum().backward()
        results.append((out, [p.grad.clone() for p in layer.parameters()]))
        assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == hits
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def wait_for_compiler():
    for thread in threading.enumerate():
        if thread.name == "qtemper-compiler":
            thread.join(300)
            assert not thread.is_alive()


@pytest.fixture
def unprepared(monkeypatch):
    wait_for_compiler()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    fast.prepare_compiler.cache_clear()
    yield
    fast.prepare_compiler.cache_clear()


@pytest.mark.slow
def test_the_compiler_is_prepared_once_and_in_torchs_cache(unprepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fast.prepare_compiler()
    assert not list(tmp_path.rglob("*.so"))  # it does not wait
    fast.prepare_compiler()
    assert sum(thread.name == "qtemper-compiler" for thread in threading.enumerate()) == 1
    wait_for_compiler()
    kernels = [path for path in tmp_path.rglob("*.cpp") if "* in_ptr0" in path.read_text()]
    assert [path for kernel in kernels for path in kernel.parent.glob(f"{kernel.stem}*.so")]


@pytest.mark.parametrize("program", ["/no/such/python", "false", ""])
def test_a_compiler_that_cannot_be_prepared_is_no_error(program, unprepared, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", program)
    fast.prepare_compiler()
    wait_for_compiler()
    assert capfd.readouterr() == ("", "")


def test_no_second_process_on_a_single_core(unprepared, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    fast.prepare_compiler()
    assert not [thread for thread in threading.enumerate() if thread.name == "qtemper-compiler"]
