"""`add_factored`: the values of the general way, and the cases that it leaves to it."""

import pytest
import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from lreg_peft.core import evaluate_factored
from lreg_peft.core.coordinates import project_linear
from lreg_peft.tuner.inference import add_factored

IN, OUT, DOF = 5, 7, 6


def weights(components: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """P, b, nodes, s, v."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.rand(components, DOF - 2, generator=generator).sort(dim=1).values
    nodes = torch.cat((torch.zeros(components, 1), inner, torch.ones(components, 1)), dim=1)
    shapes = ((components, IN), (components,), (components, DOF), (components, OUT))
    projection, bias, profile, direction = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return [projection, bias, nodes, profile, direction]


def general(hidden, features, slope, projection, bias, nodes, profile, direction):
    latent = project_linear(features, projection, bias)
    curve = evaluate_factored(torch.sigmoid(latent), nodes, profile.float(), direction.float(), validate=False)
    return hidden + (curve + slope * latent @ direction.float()).to(hidden.dtype)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("slope", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(1, 1), (2,), (2, 1, 1), (2, 35), (), (0,)])
def test_the_same_values_written_into_hidden(shape, slope, components):
    hidden, features = torch.randn(*shape, OUT), torch.randn(*shape, IN)
    expected = general(hidden, features, slope, *weights(components))
    with torch.no_grad():
        total = add_factored(hidden, features, slope, *(weight.requires_grad_() for weight in weights(components)))
    assert total is hidden
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_half_precision(adapter):
    hidden, features = torch.randn(1, OUT).bfloat16(), torch.randn(1, IN).bfloat16()
    expected = general(hidden, features, 0.6, *weights(dtype=adapter))
    with torch.no_grad():
        total = add_factored(hidden, features, 0.6, *weights(dtype=adapter))
    assert total.dtype == torch.bfloat16
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "base"), [(torch.bfloat16, 256.0), (torch.float16, 2048.0)])
def test_a_sum_in_half_precision_is_rounded_once(dtype, base):
    """Eight increments below half a unit in the last place."""
    nodes, profile = torch.linspace(0, 1, DOF).repeat(8, 1), torch.ones(8, DOF)
    projection, bias, direction = torch.zeros(8, IN), torch.zeros(8), torch.full((8, OUT), 0.9)
    hidden = torch.full((1, OUT), base, dtype=dtype)
    with torch.no_grad():
        total = add_factored(hidden, torch.zeros(1, IN), 0.0, projection, bias, nodes, profile, direction)
    assert torch.equal(total, torch.full((1, OUT), base + 7.2).to(dtype))


def test_what_half_precision_cannot_hold_is_infinite():
    projection, bias, nodes, profile, direction = weights(1)
    given = (torch.zeros(1, IN), 0.6, projection, torch.full_like(bias, 1e6), nodes, profile, direction.abs())
    with torch.no_grad():
        total = add_factored(torch.zeros(1, OUT).half(), *given)
    assert total.eq(torch.inf).all()


@pytest.mark.parametrize("size", [40.0, 2000.0, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("sign", [-1, 1])
def test_far_from_the_middle_of_the_sigmoid(size, sign):
    """Where exp(-z) overflows, too; what is not finite stays so, as in the general way."""
    projection, bias, nodes, profile, direction = weights(1)
    projection = torch.zeros_like(projection)
    bias = torch.full_like(bias, sign * size)
    hidden, features = torch.zeros(1, OUT), torch.randn(1, IN)
    for slope in (0.0, 1e-3):
        given = (features, slope, projection, bias, nodes, profile, direction)
        curve = evaluate_factored(bias.sigmoid()[None], nodes, profile, direction, validate=False)
        expected = general(hidden, *given) if slope else curve
        with torch.no_grad():
            total = add_factored(hidden.clone(), *given)
        torch.testing.assert_close(total, expected, equal_nan=True)


def test_left_to_the_general_way():
    hidden, features = torch.randn(2, OUT), torch.randn(2, IN)
    before = hidden.clone()
    add = lambda **given: add_factored(**{**plain, **given})  # noqa: E731
    names = ("projection", "bias", "nodes", "profile", "direction")
    plain = {"hidden": hidden, "features": features, **dict(zip(names, weights(), strict=True)), "slope": 0.6}
    assert add() is None, "autograd"
    with torch.no_grad():
        assert add(hidden=hidden.clone()) is not None, "nothing else is in the way"
        many = {"hidden": torch.randn(1366, OUT), "features": torch.randn(1366, IN)}
        assert add(**many) is None, "many rows"
        assert add(features=torch.randn(1, IN)) is None and add(features=torch.randn(2, IN + 1)) is None, "other rows"
        assert add(hidden=torch.randn(2, OUT + 1)) is None and add(hidden=torch.randn(2, 1)) is None, "other outputs"
        assert add(projection=None) is None, "a wrapper holds the weight elsewhere"
        assert add(hidden=torch.randn(OUT, 2).T) is None, "a view that is not contiguous"
        assert add(hidden=hidden.double()) is None
        assert add(features=features.double()) is None
        assert add(features=features.to("meta")) is None
        assert add(direction=weights()[-1].as_subclass(nn.Buffer)) is None, "a subclass may mean something else"
        with torch.autocast("cpu", torch.bfloat16):
            assert add() is None, "autocast"
        with BaseTorchFunctionMode():
            assert add() is None, "a mode that sees calls"
        seen = []
        torch.func.vmap(lambda x: seen.append(add(hidden=x[:OUT][None], features=x[OUT:][None])) or x)(
            torch.randn(2, OUT + IN)
        )
        assert seen == [None], "a transform"
    assert torch.equal(hidden, before)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is deprecated:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_values_are_not_frozen_into_a_trace():
    seen = []

    def forward(features):
        seen.append(add_factored(torch.zeros(1, OUT), features, 0.6, *weights()))
        return features

    with torch.no_grad():
        torch.jit.trace(forward, torch.randn(1, IN), check_trace=False)
    assert seen == [None]
