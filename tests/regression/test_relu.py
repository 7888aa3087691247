"""Piecewise-linear functions and ReLU networks: the same functions, in both directions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from data_sets import split
from torch import nn

from lreg_peft.regression import LagrangeRegressor, mesh_to_network, network_to_mesh
from lreg_peft.regression.mesh1d import evaluate


def network(widths: list[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


class TestFromNetworks:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_deep_network_on_the_whole_line(self, seed):
        net = network([1, 64, 64, 64, 2], seed)
        nodes, values = network_to_mesh(net)
        assert 100 < len(nodes) < 400 and (nodes.diff() > 0).all()
        x = torch.cat((torch.linspace(-1, 1, 4001), torch.linspace(-1e3, 1e3, 4001))).double()
        expected = net(x.unsqueeze(1)).detach()
        found = torch.from_numpy(evaluate(x.numpy(), nodes.numpy(), values.numpy()))
        inside = x.abs() <= 1
        # Rounding of a few layers, relative to the values: 1e-15 where the network was initialised to live.
        assert (found - expected)[inside].abs().max() < 2e-15
        # Far outside, the slope of an end element goes on for many times its length.
        assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-13

    @pytest.mark.parametrize("seed", range(3))
    def test_and_back(self, seed):
        net = network([1, 64, 64, 64, 2], seed)
        again = mesh_to_network(*network_to_mesh(net))
        x = torch.linspace(-3, 3, 4001).double().unsqueeze(1)
        assert (again(x) - net(x)).abs().max() < 5e-15

    def test_no_kink_is_missed_and_none_invented(self):
        """relu(x - 1) + relu(-2 x - 6) bends at -3 and 1 and nowhere else; 1 is where the search starts."""
        net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0], [-2.0]]))
            net[0].bias.copy_(torch.tensor([-1.0, -6.0]))
            net[2].weight.fill_(1.0)
            net[2].bias.zero_()
        nodes, values = network_to_mesh(net)
        slopes = values[:, 0].diff() / nodes.diff()
        bends = nodes[1:-1][slopes.diff().abs() > 1e-12]
        torch.testing.assert_close(bends, torch.tensor([-3.0, 1.0]).double())

    def test_linear_and_dead_networks(self):
        nodes, values = network_to_mesh(nn.Linear(1, 3))
        assert values.shape == (len(nodes), 3)
        dead = network([1, 4, 1], 0)
        with torch.no_grad():
            dead[0].weight.zero_()
        nodes, values = network_to_mesh(dead)
        assert (values == values[0]).all()

    def test_refusals(self):
        with pytest.raises(ValueError, match="Tanh"):
            network_to_mesh(nn.Sequential(nn.Linear(1, 2), nn.Tanh()))
        with pytest.raises(ValueError, match="one input"):
            network_to_mesh(nn.Linear(2, 1))
        broken = nn.Linear(1, 1)
        broken.weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="finite"):
            network_to_mesh(broken)
        with pytest.raises(ValueError, match="k = 3"):
            mesh_to_network(torch.arange(3.0), torch.zeros(4))
        with pytest.raises(ValueError, match="increasing"):
            mesh_to_network(torch.tensor([0.0, 0.0]), torch.zeros(2))


class TestToNetworks:
    def test_steep_and_uneven_meshes_lose_no_digits(self):
        """Elements from 1e-4 to 1: in a sum of ReLU slopes of 1e4 would cancel to 1e-11."""
        nodes = torch.logspace(-4, 0, 200).double()
        values = torch.sin(1 / nodes.clamp_min(0.02))
        net = mesh_to_network(nodes, values)
        x = torch.rand(5000, generator=torch.Generator().manual_seed(0)).double() * 1.2 - 0.1
        expected = evaluate(x.numpy(), nodes.numpy(), values.unsqueeze(1).numpy())[:, 0]
        error = (net(x.unsqueeze(1))[:, 0] - torch.from_numpy(expected)).abs()
        # Steps of up to 2, each with a rounded local coordinate; left of the mesh a slope goes on for 1e4 elements.
        assert error[x >= 1e-4].max() < 2e-14
        assert error.max() < 1e-11

    @pytest.mark.parametrize("name", ["A1", "B1", "A2"])
    def test_of_the_estimator(self, name):
        X, y, X_test, _ = split(name)
        model = LagrangeRegressor(interactions=0).fit(X, y)
        wide = np.concatenate((X_test, X_test * 1.5))
        found = model.to_torch()(torch.from_numpy(wide)).detach().numpy()[:, 0]
        expected = model.predict(wide)
        np.testing.assert_allclose(found, expected, atol=1e-11, rtol=1e-11)
        np.testing.assert_allclose(found[: len(X_test)], expected[: len(X_test)], atol=1e-13)
        assert {type(layer) for layer in model.to_torch()} == {nn.Linear, nn.ReLU}

    def test_constant_columns_and_outputs(self):
        X, y, X_test, _ = split("A2")
        X, X_test = np.column_stack((X, np.ones(len(X)))), np.column_stack((X_test, np.ones(len(X_test))))
        model = LagrangeRegressor(interactions=0).fit(X[:500], np.stack((y, -y), 1)[:500])
        found = model.to_torch()(torch.from_numpy(X_test)).detach().numpy()
        np.testing.assert_allclose(found, model.predict(X_test), atol=1e-13)
        flat = LagrangeRegressor().fit(X[:9, 2:], y[:9])
        np.testing.assert_allclose(
            flat.to_torch()(torch.from_numpy(X_test[:, 2:])).detach().numpy()[:, 0], flat.predict(X_test[:, 2:])
        )

    def test_interactions_are_refused(self):
        X, y, _, _ = split("Friedman-1")
        with pytest.raises(ValueError, match="interactions=0"):
            LagrangeRegressor().fit(X, y).to_torch()


class TestEstimatorFromNetworks:
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_predicts_what_the_network_does(self, outputs):
        net = network([1, 64, 64, 64, outputs], 0)
        model = LagrangeRegressor.from_torch(net)
        x = np.linspace(-30, 30, 2001)[:, None]
        expected = net(torch.from_numpy(x)).detach().numpy()
        found = model.predict(x)
        assert found.shape == ((2001,) if outputs == 1 else (2001, 2))
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-14)
        mean, std = model.predict(x, return_std=True)
        assert std.shape == mean.shape and (std == 0).all()
        assert model.noise_variance_ == 0 if outputs == 1 else (model.noise_variance_ == 0).all()
