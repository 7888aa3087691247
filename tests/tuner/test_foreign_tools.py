"""What other tools do to an adapted model: tracing, offloading, casting files; models with odd modules."""

import accelerate
import pytest
import tiny
import torch
from accelerate.hooks import remove_hook_from_submodules
from peft import get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from lreg_peft import (
    LRegConfig,
    cache_features,
    fit_coefficients,
    initialize_lreg_weights,
    inspect_targets,
    refine_linearized,
)
from lreg_peft.core.basis import evaluate_profile
from lreg_peft.core.mesh import uniform_nodes

IDS = torch.arange(3, 21).view(2, 9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("n_nodes", [3, 40])  # few and many nodes take different ways
@pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
def test_a_traced_model_computes_the_same(weighting, n_nodes):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = (
        get_peft_model(model, LRegConfig(target_modules=["0", "2"], weighting=weighting, n_nodes=n_nodes))
        .eval()
        .double()
    )
    tiny.shake(model)
    traced = torch.jit.trace(model.get_base_model(), torch.randn(5, 4, dtype=torch.float64))
    other = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-12, atol=1e-12)  # sums in another order


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("gradients", [False, True])  # torch checks a trace by a second one without gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_of_a_few_rows_is_one_of_many(dtype, gradients, rows):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    config = LRegConfig(target_modules=["0", "2"], weighting="factored", linear_term=True, n_components=1)
    model = get_peft_model(model, config).eval().to(dtype)
    tiny.shake(model)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model.get_base_model(), torch.randn(rows, 4, dtype=dtype))
    for other in (torch.randn(1, 4, dtype=dtype), torch.randn(70, 4, dtype=dtype)):
        rounding = 0.02 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(traced(other), model(other), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("pre_dispatch", [False, True])  # recorded by a dispatch mode, or before by a function mode
@pytest.mark.parametrize("rows", [1, 20])
def test_operations_recorded_for_some_rows_are_those_of_others(rows, pre_dispatch):
    config = LRegConfig(target_modules=["0"], weighting="factored", linear_term=True, n_components=1)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config).eval()
    tiny.shake(model)
    with torch.no_grad():
        recorded = make_fx(model.get_base_model(), pre_dispatch=pre_dispatch)(torch.randn(rows, 4))
        other = torch.randn(rows, 4)
        torch.testing.assert_close(recorded(other), model(other))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_computes_the_same(where, buffers, tmp_path):
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["c_attn", "mlp", "lm_head"])).eval()
    tiny.shake(model)
    expected = tiny.outputs(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert torch.equal(tiny.outputs(model), expected)
    remove_hook_from_submodules(model)


BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
VALUES = {"x": torch.randn(6, 4), "labels": torch.randn(6, 1)}


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 1))

    def forward(self, x, labels=None):
        output = super().forward(x)
        loss = None if labels is None else nn.functional.mse_loss(output, labels)
        return {"loss": loss, "logits": output}


WORK = {
    "a head that is a block": (
        lambda: tiny.build("bert", "MASKED_LM"),
        {},
        lambda model, folder: model.train()(**BATCH).loss.backward(),
    ),
    "pca": (
        tiny.gpt2,
        {"target_modules": ["mlp", "lm_head"], "init_weights": "pca"},
        lambda model, folder: initialize_lreg_weights(model, [BATCH] * 3, start_head=True, show_progress=False),
    ),
    "gradient": (
        tiny.gpt2,
        {"target_modules": ["mlp"], "init_weights": "gradient"},
        lambda model, folder: initialize_lreg_weights(model, [BATCH], show_progress=False),
    ),
    "fit": (
        tiny.gpt2,
        {},
        lambda model, folder: fit_coefficients(model, [BATCH], max_passes=3, show_progress=False),
    ),
    "fit of values": (
        Network,
        {"target_modules": ["1"]},
        lambda model, folder: fit_coefficients(model, [VALUES], max_passes=3, show_progress=False),
    ),
    "cache": (
        tiny.gpt2,
        {},
        lambda model, folder: cache_features(model, [BATCH], folder / "c")[1],
    ),
    "refinement": (
        Network,
        {"target_modules": ["0"]},
        lambda model, folder: refine_linearized(model, [VALUES], rank=1, show_progress=False),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a fit that stops early
@pytest.mark.parametrize("name", WORK)
def test_the_default_device_of_torch_does_not_matter(name, tmp_path):
    """Meta stands for any device that is not the model's."""
    build, options, work = WORK[name]
    model = get_peft_model(build(), LRegConfig(preset="paper", **options))
    with torch.device("meta"):
        work(model, tmp_path)


def test_one_coordinate_is_on_its_own_device():
    nodes, profile = uniform_nodes(2, 5), torch.randn(2, 5)
    with torch.device("meta"):
        assert evaluate_profile(torch.rand(1, 2, device="cpu"), nodes, profile).device.type == "cpu"


def test_modules_whose_weight_is_read_past_them_are_found_by_an_example():
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4))
    config = LRegConfig(target_modules="all-linear")
    with pytest.raises(
        ValueError, match=r"2 modules cannot be adapted(.|\n)*1\.mixer\.dt_proj' \(Linear\): the model does not call it"
    ):
        inspect_targets(model, config, example_inputs={"input_ids": IDS})
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out '0\.out_proj'.*never calls"):
        inspect_targets(attention, config)


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(XLMWithLMHeadModel, XLMConfig), (FlaubertWithLMHeadModel, FlaubertConfig)],
)
def test_heads_that_take_the_labels(model_class, config_class):
    base = model_class(
        config_class(vocab_size=61, emb_dim=16, n_layers=2, n_heads=2, pad_index=2, dropout=0.0, attention_dropout=0.0)
    ).eval()
    expected = base(input_ids=IDS, labels=IDS).loss
    model = get_peft_model(base, LRegConfig(preset="paper", task_type="CAUSAL_LM")).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


MOE = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("target", ["mlp", "experts"])
@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            Qwen2MoeForCausalLM,
            Qwen2MoeConfig(**MOE, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=4),
        ),
        (MixtralForCausalLM, MixtralConfig(**MOE, intermediate_size=24, num_local_experts=4)),
        (MixtralForCausalLM, MixtralConfig(**MOE, intermediate_size=8, num_local_experts=4)),  # 2 * 8 = hidden
    ],
)
def test_mixtures_of_experts_have_the_width_of_the_model(model_class, config, target):
    model = get_peft_model(model_class(config), LRegConfig(target_modules=[target])).train()
    assert [(layer.in_features, layer.out_features) for layer in tiny.layers(model)] == [(16, 16)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert tiny.layers(model)[0].lreg_coefficients["default"].weight.grad.any()


def test_embeddings_are_refused_with_what_to_do_instead():
    with pytest.raises(TypeError, match=r"'transformer\.wte' is an embedding.*trainable_token_indices.*modules_to"):
        inspect_targets(tiny.gpt2(), LRegConfig(target_modules=["wte"]))
