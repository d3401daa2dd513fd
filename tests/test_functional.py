"""Pure functions: ranges, gradients of the small autograd functions, statistics of the counter-based noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtemper import counter
from qtemper import functional as F


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("levels", ["unsigned", "signed", "symmetric"])
def test_every_grid_has_two_to_the_bits_levels(bits, levels):
    qmin, qmax, zero_point = F.code_range(bits, levels)
    assert qmax - qmin + 1 == 2**bits
    values = [(q - zero_point) for q in range(qmin, qmax + 1)]
    if levels == "symmetric":
        assert values == [-v for v in reversed(values)]
        assert 0 not in values
    else:
        assert 0 in values


@given(st.floats(-100, 100), st.floats(1e-3, 10), st.integers(1, 8))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_decode_inverts_encode_inside_the_range(x, scale, bits):
    codes = F.code_range(bits, "signed")
    x, scale = torch.tensor(x, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    back = F.decode(F.encode(x, scale, codes), scale, codes)
    clipped = torch.clamp(x, scale * codes.qmin, scale * codes.qmax)
    torch.testing.assert_close(back, clipped)


def test_round_ste_rounds_ties_to_even_and_passes_the_gradient():
    v = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.2], requires_grad=True)
    out = F.round_ste(v)
    assert out.tolist() == [-2, 0, 0, 2, 2, 0]
    out.backward(torch.arange(6.0))
    assert v.grad.tolist() == list(range(6))


def test_small_gradients():
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    F.scale_gradient(x, 0.25).sum().backward()
    assert x.grad.tolist() == [0.25, 0.25]
    x.grad = None
    y = F.positive(x)
    assert y.tolist() == [1.0, pytest.approx(F.SCALE_FLOOR)]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0], "a step below the floor still gets its gradient"
    value = torch.tensor([7.0, 8.0], requires_grad=True)
    x.grad = None
    out = F.replace_value(x, value)
    assert out.tolist() == [7.0, 8.0]
    out.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    assert value.grad is None


def test_gradient_scaling_never_turns_the_gradient_around():
    v = torch.tensor([0.4, 0.4, -0.4, -0.4], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([0.0, 3.0, 0.0, -3.0], dtype=torch.float64)  # noise can move it further than half a bin
    g = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    F.elementwise_gradient_scaling(v, value, torch.tensor(0.5, dtype=torch.float64)).backward(g)
    assert v.grad.tolist() == pytest.approx([1.2, 0.0, -1.2, 0.0])


def test_gradients_of_many_outputs_at_once():
    limits = F.code_range(2, "signed")
    x, step = torch.randn(6).requires_grad_(), torch.tensor(0.4).requires_grad_()
    v = F.encode(x, step.detach(), limits)
    x_hat = F.decode_learned_step(F.round_ste(v), v, step, limits)
    together = torch.autograd.grad(x_hat, (x, step), torch.eye(6), is_grads_batched=True, retain_graph=True)
    each = zip(*(torch.autograd.grad(x_hat, (x, step), row, retain_graph=True) for row in torch.eye(6)), strict=True)
    for found, expected in zip(together, each, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_vmap_over_the_autograd_functions():
    v = torch.randn(3, 5, dtype=torch.float64)

    def gradient(row):
        return torch.func.grad(lambda r: (F.round_ste(r) * r.detach()).sum())(row)

    assert torch.equal(torch.func.vmap(gradient)(v), v)


class TestNoise:
    """Statistics over N draws; bounds are six standard errors, so that a sound generator fails once in 1e8."""

    N = 2**22

    def draws(self, *words, n=N):
        return counter.counter_uniform(
            torch.arange(n, dtype=torch.int32), torch.tensor(counter.derive_key(*words), dtype=torch.int32)
        )

    def test_is_a_pure_function_of_index_and_key(self):
        assert torch.equal(self.draws(1, 2, n=1000), self.draws(1, 2, n=2000)[:1000])
        assert not torch.equal(self.draws(1, 2, n=1000), self.draws(1, 3, n=1000))

    def test_is_inside_the_open_interval(self):
        u = self.draws(0)
        assert 0 < u.min() < 1e-6
        assert 1 - 1e-6 < u.max() < 1

    def test_mean_variance_and_histogram(self):
        u = self.draws(5).double()
        assert abs(u.mean() - 0.5) < 6 * math.sqrt(1 / 12 / self.N)
        assert abs(u.var() - 1 / 12) < 6 * math.sqrt(1 / 180 / self.N)
        counts = torch.histc(u, 1024, 0, 1)
        expected = self.N / 1024
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 1023) < 6 * math.sqrt(2 * 1023)

    @pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 32, 64, 576, 1024, 4096, 16384, 65536])
    def test_elements_are_uncorrelated(self, lag):
        u = self.draws(9).double() - 0.5
        correlation = (u[:-lag] * u[lag:]).mean() * 12
        assert abs(correlation) < 6 / math.sqrt(self.N)

    @pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**20)])
    def test_streams_are_uncorrelated_at_every_small_shift(self, other):
        a, b = self.draws(0, 0, 0, n=2**18).double() - 0.5, self.draws(*other, n=2**18).double() - 0.5
        products = torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b).conj()) / len(a) * 12
        # 2**18 shifts at once: the largest of so many normal values stays below 7 standard errors.
        assert products.abs().max() < 7 / math.sqrt(len(a))

    def test_pairs_fill_the_square(self):
        u = self.draws(3)
        cells = (u[:-1] * 64).int() * 64 + (u[1:] * 64).int()
        counts = torch.bincount(cells.long(), minlength=4096).double()
        expected = (self.N - 1) / 4096
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 4095) < 6 * math.sqrt(2 * 4095)

    def test_eager_and_compiled_agree_to_the_bit(self):
        compiled = torch.compile(counter.counter_uniform, fullgraph=True)
        index, key = torch.arange(10_001, dtype=torch.int32), torch.tensor(counter.derive_key(4), dtype=torch.int32)
        assert torch.equal(compiled(index, key), counter.counter_uniform(index, key))

    @pytest.mark.parametrize("shape", [(2**12, 2**10), (2**8, 64, 16, 16)], ids=["rows", "images"])
    def test_elements_of_a_tensor(self, shape):
        source = counter.NoiseSource()
        source.seed(0, "here")
        like = torch.empty(shape)
        for draw in (source, source.dither):
            u = math.sqrt(12) * (draw(like).double() - 0.5)
            assert abs(u.mean()) < 6 / math.sqrt(self.N)
            assert abs((u * u).mean() - 1) < 6 * math.sqrt(0.8 / self.N)
            for dim in range(len(shape)):
                # Any two slices share the words of their rows or of their columns, which must not show: not in one
                # product, nor in the sums of products over the slice, nor in those of two pairs.
                pairs = u * u.roll(1, dim)
                assert abs(pairs.mean()) < 6 / math.sqrt(self.N), dim
                sums = pairs.transpose(0, dim).flatten(1).mean(1) * math.sqrt(self.N / shape[dim])
                assert abs((sums**2).mean() - 1) < 6 * math.sqrt(2 / shape[dim]), dim
                for other in set(range(len(shape))) - {dim}:
                    assert abs((pairs * pairs.roll(1, other)).mean()) < 6 / math.sqrt(self.N), (dim, other)

    @pytest.mark.parametrize("draw", ["__call__", "dither", "gaussian"])
    def test_no_two_rows_are_alike(self, draw):
        source = counter.NoiseSource()
        worst = 0.0
        for key in range(3):
            source.seed(key, "rows")
            u = getattr(source, draw)(torch.empty(2048, 512))
            u = (u - u.mean()) / u.std()
            worst = max(worst, float((u @ u.T).triu(1).abs().max()) / 512**0.5)
        assert worst < 6.5  # of 6.3 million pairs, in standard errors; 5.3 is expected

    def test_dither_is_independent_of_gaussian_noise(self):
        source = counter.NoiseSource()
        source.seed(1, "here")
        like = torch.empty(2048, 2048)
        z, dither = source.gaussian(like), source.dither(like).double() - 0.5
        for low, high in ((0, 0.02), (0, 0.1), (-0.1, 0), (1, 1.1), (-4, -3)):
            chosen = dither[(low < z) & (z < high)] * math.sqrt(12)
            assert abs(chosen.mean()) < 5 / math.sqrt(len(chosen)), low
            assert abs((chosen**2).mean() - 1) < 5 * math.sqrt(0.8 / len(chosen)), low

    @pytest.mark.parametrize(
        "shape", [(), (7,), (6, 5), (6, 3, 5), (6, 4, 3, 5), (6, 2, 3, 4, 5), (0, 4, 3, 5), (6, 0)]
    )
    def test_parts_and_blocks_are_those_of_the_whole(self, shape):
        source = counter.NoiseSource()
        source.seed(3, "here")
        x = torch.empty(shape)
        whole = source(x)
        assert whole.shape == x.shape
        if x.dim() and len(x):
            for first in range(len(x)):
                source.block = (first, len(x))
                assert torch.equal(source(x[first : first + 1]), whole[first : first + 1])
            source.block = None
        if len(shape) > 1 and len(x):
            source.part = 1
            assert torch.equal(source(x[3:]), whole[3:])

    def test_words_are_the_same_by_numpy_and_by_torch(self):
        key = torch.tensor(counter.derive_key(4), dtype=torch.int32)
        for first in (0, 5, 2**31 - 3, 2**40 + 1):
            words = counter._words(key, first, 100, 30).view(torch.int32)
            assert torch.equal(words, counter._words_by_numpy(key, first, 100, 30).view(torch.int32))
        # The other checks compare values, and some of these bits are NaN's.
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.qtemper.counter_words.default, (key, 5, 100, 30), test_utils=checks)

    @pytest.mark.parametrize("shape", [(9, 50), (3, 8, 6, 6)])
    def test_a_source_draws_the_same_eager_and_compiled(self, shape):
        source = counter.NoiseSource()
        x = torch.empty(shape)
        for draw in (source.forward, source.signed, source.dither):
            assert torch.equal(torch.compile(draw, fullgraph=True)(x), draw(x))
        z = source.gaussian(x)
        torch.testing.assert_close(torch.compile(source.gaussian, fullgraph=True)(x), z, rtol=1e-5, atol=1e-6)

    def test_gaussian(self):
        words = torch.arange(self.N, dtype=torch.int32)
        bits = counter.counter_bits(words, torch.tensor(counter.derive_key(8), dtype=torch.int32))
        z = counter.gaussian(bits).double()
        assert abs(z.mean()) < 6 / math.sqrt(self.N)
        assert abs(z.var() - 1) < 6 * math.sqrt(2 / self.N)
        assert abs((z**4).mean() - 3) < 6 * math.sqrt(96 / self.N)
        probability = torch.special.ndtr(z)
        counts = torch.histc(probability, 1024, 0, 1)
        chi2 = float(((counts - self.N / 1024) ** 2 / (self.N / 1024)).sum())
        assert abs(chi2 - 1023) < 6 * math.sqrt(2 * 1023)
        assert z.abs().max() < 5.2
