"""P in larger units for wide inputs: the same function, and steps of Adam that move z alike at every width."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from lreg_peft import LRegConfig, convert_to_lora, initialize_lreg_weights, recommended_config
from lreg_peft.core.coordinates import initial_projection
from lreg_peft.core.linear_maps import Projection

RECIPE = {"target_modules": ["attn", "mlp.c_proj"], "weighting": "factored", "linear_term": True, "n_nodes": 4}


def moved(width: int, base_width: int | None) -> torch.Tensor:
    """How far a step of Adam moves z where all features are one."""
    projection, x = Projection(width, 2, base_width), torch.ones(3, width)
    before = projection(x)
    optimizer = torch.optim.Adam(projection.parameters(), lr=1e-2)
    projection(x).sum().backward()
    optimizer.step()
    return (before - projection(x)).detach()


@pytest.mark.parametrize("width", [64, 256, 1536])
def test_a_step_moves_z_by_as_much_as_at_the_base_width(width):
    bias = 1e-2
    torch.testing.assert_close(moved(width, 64), torch.full((3, 2), 64 * 1e-2 + bias), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved(width, None), torch.full((3, 2), width * 1e-2 + bias), rtol=1e-3, atol=0)


def test_inputs_up_to_the_base_width_are_as_without_one():
    assert Projection(64, 2, 64).scale == Projection(9, 2, 64).scale == Projection(100, 2).scale == 1


def test_the_start_is_that_of_any_other_projection():
    torch.manual_seed(0)
    expected = initial_projection(3, 40)
    torch.manual_seed(0)
    torch.testing.assert_close(Projection(40, 3, base_width=8).matrix, expected)


@pytest.mark.parametrize("method", ["pca", "gradient"])
def test_a_start_from_data_gives_the_same_function(method):
    batch, models = tiny.inputs(), []
    labelled = {**batch, "labels": batch["input_ids"]}
    for base_width in (None, 8):
        model = get_peft_model(tiny.gpt2(), LRegConfig(**RECIPE, base_width=base_width, init_weights=method))
        initialize_lreg_weights(model, [labelled], method=method, show_progress=False)
        models.append(model)
    for plain, scaled in zip(*map(tiny.layers, models), strict=True):
        (a, curve, _), (b, scaled_curve, _) = plain.parts("default"), scaled.parts("default")
        assert a.scale == 1 and b.scale == 8 / scaled.in_features
        torch.testing.assert_close(b.matrix, a.weight)
        torch.testing.assert_close(scaled_curve.nodes, curve.nodes)


def test_saved_and_loaded(tmp_path):
    model = tiny.adapt(tiny.gpt2(), **RECIPE, base_width=8).eval()
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path).eval()
    batch = tiny.inputs()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_its_lora_is_that_of_p():
    """Exact, since profiles are constants."""
    model = get_peft_model(tiny.gpt2(), LRegConfig(**{**RECIPE, "target_modules": ["c_attn"]}, base_width=8)).eval()
    for layer in tiny.layers(model):
        torch.nn.init.normal_(layer.parts("default")[2].weight, std=0.1)
        layer.parts("default")[1].weight.data.zero_()
    batch = tiny.inputs()
    config, state, _ = convert_to_lora(model, [batch], show_progress=False)
    lora = get_peft_model(tiny.gpt2(), config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_the_recommended_configuration_has_one():
    assert recommended_config(tiny.gpt2()).base_width == 256
    assert get_peft_model(tiny.gpt2(), LRegConfig()).peft_config["default"].base_width == 256
    assert get_peft_model(tiny.gpt2(), LRegConfig(base_width=8)).peft_config["default"].base_width == 8
    assert recommended_config(tiny.gpt2(), base_width=None).base_width is None
