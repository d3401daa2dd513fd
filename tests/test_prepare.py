"""prepare, layers and policies: what becomes of a float model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qtemper
from qtemper import BitPolicy, Rule
from qtemper.layers import QuantConv2d, QuantLayer, QuantLinear
from qtemper.prepare import quantizer_table

SAME = BitPolicy(8, 8, "same")

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (2, 4, 9, 9)),
    "dilated, strided, reflecting": (
        nn.Conv2d(4, 6, 3, dilation=2, stride=2, padding=2, padding_mode="reflect"),
        (2, 4, 9, 9),
    ),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9, 9)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6, bias=False), (2, 7, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_layer_kind_is_the_float_layer_on_quantized_operands(name, granularity):
    layer, shape = copy.deepcopy(LAYERS[name])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(copy.deepcopy(layer))
    rule = Rule("*", weight_granularity=granularity, activation_granularity=granularity)
    qtemper.prepare(model, "lsq", BitPolicy(8, 8, "same", rules=(rule,)))
    qtemper.calibrate(model, [x])
    quantized = model[0]
    assert isinstance(quantized, QuantLayer)
    assert isinstance(quantized, type(layer))
    with torch.no_grad():
        layer.weight.copy_(quantized.weight_quantizer(quantized.latent_weight))
    # The convolution of codes is exact, that of floats is rounded in every sum.
    torch.testing.assert_close(model(x), layer(quantized.act_quantizer(x)), rtol=1e-5, atol=1e-6)
    # 8 bits on both: close to the float layer at once.
    original, _ = LAYERS[name]
    assert (model(x) - original(x)).abs().max() < 0.1 * original(x).abs().max()


def test_a_users_subclass_keeps_its_forward_and_survives_pickling():
    model = nn.Sequential(Doubling(3, 4))
    x = torch.randn(5, 3)
    qtemper.prepare(model, "lsq", SAME)
    qtemper.calibrate(model, [x])
    layer = model[0]
    assert isinstance(layer, Doubling)
    expected = 2 * nn.functional.linear(layer.act_quantizer(x), layer.weight, layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(layer)
        assert torch.equal(twin(x), model(x))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight, self.bias)


def test_the_common_layers_have_public_classes():
    model = qtemper.prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), "lsq", SAME)
    assert type(model[0]) is QuantConv2d
    assert type(model[2]) is QuantLinear


class Shared(nn.Module):
    """One convolution and one ReLU, each used twice; a weight tied between two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return self.two(self.one(x.mean(dim=(2, 3))))


def test_shared_modules_and_tied_weights_stay_shared():
    torch.manual_seed(0)
    model = Shared()
    x = torch.randn(4, 3, 6, 6)
    reference = model(x)
    count = len(list(model.parameters()))
    qtemper.prepare(model, "tempering", SAME)
    qtemper.calibrate(model, [x])
    assert model.two.latent_weight is model.one.latent_weight
    optimizer = torch.optim.SGD(qtemper.param_groups(model, lr=0.1), momentum=0.9)
    weights, quantizer_parameters = (group["params"] for group in optimizer.param_groups)
    assert len(weights) == count
    assert len({id(p) for p in weights + quantizer_parameters}) == len(weights) + len(quantizer_parameters)
    torch.testing.assert_close(model.eval()(x), reference, rtol=0.1, atol=0.05)
    model.train()(x).square().sum().backward()
    optimizer.step()
    # The convolution saw a signed input first and an unsigned one later: calibration looked at both.
    assert model.conv.act_quantizer.grid.levels == "signed"


def test_hooks_attributes_and_references_survive():
    layer = nn.Linear(3, 3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.note = "kept"
    model = nn.ModuleDict({"a": layer})
    model.requires_grad_(True)
    qtemper.prepare(model, "lsq", SAME)
    assert model["a"] is layer
    assert layer.note == "kept"
    qtemper.calibrate(model, [torch.randn(4, 3)], forward=lambda m, x: m["a"](x))
    layer(torch.randn(2, 3))
    assert len(calls) == 2


def test_a_single_layer_is_a_model_too():
    model = qtemper.prepare(nn.Linear(3, 3), "tempering", SAME)
    qtemper.calibrate(model, [torch.randn(4, 3)])
    assert "(model)" in qtemper.quantizer_table(model)
    model(torch.randn(2, 3)).sum().backward()


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


class TestPolicy:
    def bits(self, policy):
        return [(row.layer, row.tensor, row.bits) for row in qtemper.make_plan(network(), policy)]

    def test_presets_for_the_first_and_last_layer(self):
        middle = [("2", "weight", 2), ("2", "activation", 3)]
        for preset, bits in (("float", (32, 32)), ("8bit", (8, 8)), ("same", (2, 3))):
            ends = [[(n, "weight", bits[0]), (n, "activation", bits[1])] for n in "04"]
            assert self.bits(BitPolicy(2, 3, preset)) == [*ends[0], *middle, *ends[1]]

    def test_a_float_tensor_stays_float_under_the_8_bit_preset(self):
        assert {bits for _, tensor, bits in self.bits(BitPolicy(1, 32, "8bit")) if tensor == "activation"} == {32}

    def test_later_rules_win(self):
        policy = BitPolicy(2, 2, "same", rules=(Rule("*", weight=4), Rule("2", weight=8, activation=32)))
        weights = [bits for _, tensor, bits in self.bits(policy) if tensor == "weight"]
        assert weights == [4, 8, 4]
        assert ("2", "activation", 32) in self.bits(policy)

    def test_shorthand(self):
        assert BitPolicy.parse("w1a32") == BitPolicy(1, 32)

    def test_the_plan_is_a_table_that_can_be_edited(self):
        plan = qtemper.make_plan(network(), "W2A2")
        assert str(plan).splitlines()[2].split() == ["0", "weight", "float", "-", "-"]
        plan.set("0", "weight", bits=8, granularity="channel")
        model = qtemper.prepare(network(), "lsq", plan)
        assert model[0].weight_quantizer.grid.step.shape == (4,)
        assert model[0].act_quantizer is None
        assert type(model[4]) is nn.Conv2d

    def test_methods_choose_the_levels_unless_the_policy_does(self):
        rows = list(qtemper.make_plan(network(), BitPolicy(2, 2, "same"), "ewgs"))
        assert {r.levels for r in rows if r.tensor == "weight"} == {"symmetric"}
        policy = BitPolicy(2, 2, "same", rules=(Rule("*", weight_levels="signed"),))
        rows = list(qtemper.make_plan(network(), policy, qtemper.get_method("ewgs")))
        assert {r.levels for r in rows if r.tensor == "weight"} == {"signed"}


def test_noise_streams_differ_by_quantizer_and_seed():
    def keys(seed):
        model = qtemper.prepare(network(), "tempering", BitPolicy(2, 2, "same"), seed=seed)
        return [tuple(v.tolist()) for k, v in model.named_buffers() if k.endswith("noise.key")]

    first, second = keys(0), keys(1)
    assert len(set(first)) == len(first) == 6
    assert not set(first) & set(second)
    assert keys(0) == first


def test_tempering_scheduler_counts_like_set_progress():
    model = qtemper.prepare(network(), "tempering", "W2A2")
    scheduler = qtemper.Tempering(model, total_steps=10)
    twin = copy.deepcopy(model)
    for step in range(1, 11):
        scheduler.step()
        qtemper.set_progress(twin, step / 10)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())  # NaN: not calibrated
    restored = qtemper.Tempering(copy.deepcopy(model), total_steps=10)
    restored.load_state_dict(scheduler.state_dict())
    assert restored.last_step == 10


@pytest.mark.parametrize(("rule", "trained"), [((), False), ((Rule("0", train_input=True),), True)])
def test_an_8_bit_network_input_keeps_its_calibrated_scale(rule, trained):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    qtemper.prepare(model, "lsq", BitPolicy(first_last="8bit", rules=rule))
    assert all(p.requires_grad == trained for p in model[0].act_quantizer.parameters())
    others = (model[0].weight_quantizer, model[1].act_quantizer, model[2].act_quantizer)
    assert all(p.requires_grad for q in others for p in q.parameters())
    assert ("fixed" in quantizer_table(model)) != trained


def test_a_network_input_of_fewer_bits_trains_its_scale():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qtemper.prepare(model, "lsq", BitPolicy(first_last="8bit", rules=(Rule("0", activation=2),)))
    assert all(p.requires_grad for p in model[0].act_quantizer.parameters())
