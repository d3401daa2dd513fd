"""What a `with` makes of a model, and that it takes it back."""

import pytest
import torch
from torch import nn

import qtemper
from qtemper import BitPolicy
from qtemper.modes import eval_mode


def test_float_mode_is_the_float_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    x = torch.randn(8, 3)
    expected = model(x)
    qtemper.prepare(model, "tempering", BitPolicy(1, 1, "same"))
    with qtemper.float_mode(model):
        assert torch.equal(model(x), expected)
    qtemper.calibrate(model, [x])
    assert not torch.equal(model(x), expected)


def test_eval_mode_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), eval_mode(model):
        model(torch.zeros(1, 3))
    assert [module.training for module in model.modules()] == before
