import numpy as np
import pytest
import reference
import torch

from lreg_peft.core import LOGISTIC_NORMAL_SCALE, evaluate, initial_projection, uniform_nodes
from lreg_peft.core.coordinates import project


def test_whole_shortcut_equals_the_literal_formula():
    torch.manual_seed(0)
    features = torch.randn(9, 6, dtype=torch.float64)
    projection, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    nodes = uniform_nodes(3, 5, dtype=torch.float64)
    coefficients = torch.randn(3, 5, 4, dtype=torch.float64)
    result = evaluate(project(features, projection, bias), nodes, coefficients)
    expected = reference.shortcut(*(t.numpy() for t in (features, projection, bias, nodes, coefficients)))
    np.testing.assert_allclose(result, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coordinates_are_computed_in_fp32(dtype):
    features, projection = torch.randn(40, 64).to(dtype), torch.randn(2, 64)
    coords = project(features, projection, torch.zeros(2))
    assert coords.dtype == torch.float32
    assert torch.equal(coords, torch.sigmoid(features.float() @ projection.T))


def test_normal_features_fill_the_unit_interval_evenly():
    torch.manual_seed(0)
    coords = project(torch.randn(20000, 48), initial_projection(4, 48), torch.zeros(4))
    deciles = torch.quantile(coords, torch.arange(1, 10) / 10, dim=0)
    # 0.0095 is the distance of the scaled logistic function from the normal one, 0.01 the sampling error.
    assert (deciles - torch.arange(1, 10).unsqueeze(1) / 10).abs().max() < 0.02


def test_scale_is_the_classical_one():
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    distance = (torch.sigmoid(LOGISTIC_NORMAL_SCALE * z) - torch.special.ndtr(z)).abs().max()
    assert 0.0094 < distance < 0.0096


def test_initial_rows_are_orthogonal_and_meta_stays_meta():
    projection = initial_projection(3, 10, dtype=torch.float64)
    expected = LOGISTIC_NORMAL_SCALE**2 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(projection @ projection.T, expected)
    assert initial_projection(3, 10, device="meta").device.type == "meta"
