"""One trained model at other bits: what stays, what follows, what is found anew."""

import pytest
import torch
from torch import nn

import qtemper
from qtemper import BitPolicy, Rule
from qtemper.functional import round_ste
from qtemper.methods.noise import Noise
from qtemper.methods.rand import RAND

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(first, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def trained(method, policy):
    model = qtemper.calibrate(qtemper.prepare(network(), method, policy), [X])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


def policy(bits):
    return BitPolicy(bits, 8, "same", rules=(Rule("1", weight_granularity="channel"),))


@pytest.mark.parametrize("method", ["lsq", "rand", "tempering"])
def test_at_the_bits_of_the_training_it_is_the_trained_model(method):
    model = trained(method, policy(4))
    again = qtemper.requantize(model, network(1), method, policy(4), [X]).eval()
    assert torch.equal(again(X), model(X))


def test_weights_get_other_levels_and_all_else_stays():
    model = trained("lsq", policy(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = qtemper.requantize(model, network(1), "lsq", policy(3), [X])
    changed = {key for key, value in other.state_dict().items() if not torch.equal(value, before[key])}
    weights = {key for key in before if "weight_quantizer.grid." in key}
    assert changed == weights
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert other[1].weight.unique().numel() <= 4 * 7 + 1
    # Batch norm only where it is asked for.
    qtemper.requantize(model, other := network(1), "lsq", policy(2), [X], batch_norm=True)
    assert not torch.equal(other[0][1].running_mean, before["0.1.running_mean"])


def test_another_method_gives_its_own_grid():
    model = trained(Noise(), policy(4))
    other = qtemper.requantize(model, network(1), RAND(), policy(6), [X])
    latent = model[3].latent_weight.detach()
    scale = latent.abs().max() / 31
    torch.testing.assert_close(other.eval()[3].weight, round_ste(latent / scale) * scale)


def test_latent_state_is_the_float_networks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    model = qtemper.prepare(Twice(), "tempering", BitPolicy(4, 4, "same"))
    assert qtemper.latent_state(model).keys() == Twice().state_dict().keys()
    assert torch.equal(qtemper.latent_state(model)["two.weight"], model.one.latent_weight)
    assert qtemper.latent_state(qtemper.prepare(nn.Linear(3, 3), "lsq", BitPolicy(4, 4, "same"))).keys() == {
        "weight",
        "bias",
    }


def test_another_architecture_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        qtemper.requantize(
            trained("lsq", policy(4)), nn.Sequential(network()[0], nn.Conv2d(4, 9, 3)), "lsq", "W3A3", [X]
        )
