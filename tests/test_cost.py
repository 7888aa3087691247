"""What a training step costs, counted in multiplications and passes: nothing here depends on the machine."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from lreg_peft import LRegConfig
from lreg_peft.core.linear_maps import Projection

HIDDEN, VOCABULARY, BATCH, LENGTH = 32, 500, 2, 17
IDS = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _in_place_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: object) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_in_place_product._get_raw = True
IN_PLACE = {torch.ops.aten.addmm_: _in_place_product}  # torch's counter knows the other form only
N = BATCH * (LENGTH - 1)  # predicted tokens: 32, which is not rounded up


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=HIDDEN, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def flops(model: nn.Module, batch: dict | None = None, *, backward: bool = True) -> int:
    batch = batch or {"input_ids": IDS, "labels": IDS}
    if backward:
        model(**batch).loss.backward()  # in the first step the loss is compared with the model's own
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.set_grad_enabled(backward):
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def frozen() -> int:
    # Without the head's part for the last token of each sample, which predicts nothing.
    return flops(gpt2(), backward=False) - 2 * BATCH * HIDDEN * VOCABULARY


@pytest.mark.parametrize(
    ("weighting", "d", "n_nodes", "k"), [("full", 2, 8, 16), ("full", 2, 2, 4), ("factored", 3, 64, 3)]
)
def test_a_shortcut_at_the_head_costs_the_frozen_forward_and_three_thin_products(weighting, d, n_nodes, k):
    model = get_peft_model(
        gpt2(), LRegConfig(preset="paper", n_components=d, n_nodes=n_nodes, weighting=weighting, fused_loss=True)
    ).train()
    projection = 2 * 2 * N * HIDDEN * d  # forward and the gradient of P; the features get none
    assert flops(model) == frozen() + 3 * 2 * N * k * VOCABULARY + projection


def test_lora_costs_more_than_twice_the_frozen_forward():
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).train()
    assert flops(model) > 1.9 * frozen()


def test_query_and_key_shortcuts_cost_no_more_than_lora_there():
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH + 2, pad_token_id=1,
    )  # fmt: skip
    batch = {"input_ids": IDS, "labels": torch.zeros(BATCH, dtype=torch.long)}
    counts = {}
    for name, adapter in (
        ("lora", LoraConfig(task_type="SEQ_CLS", target_modules=["query", "key"], r=8)),
        (
            "lreg",
            LRegConfig(
                task_type="SEQ_CLS", target_modules=["query", "key"], weighting="factored", n_components=8, n_nodes=32
            ),
        ),
    ):
        counts[name] = flops(get_peft_model(RobertaForSequenceClassification(config).eval(), adapter).train(), batch)
    assert counts["lreg"] <= counts["lora"]


def test_a_masked_language_model_computes_logits_of_the_masked_tokens_only():
    from transformers import RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH + 2, pad_token_id=1,
    )  # fmt: skip
    counts = []
    for n_labels in (2, 10):
        labels = torch.full_like(IDS, -100)
        labels[0, 1 : 1 + n_labels] = 7
        adapter = LRegConfig(preset="paper", train_projection=False, fused_loss=True)
        model = get_peft_model(RobertaForMaskedLM(config).eval(), adapter).train()
        counts.append(flops(model, {"input_ids": IDS, "labels": labels}))
    per_token = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * VOCABULARY  # RoBERTa's head: dense, then decoder
    shortcut = 2 * 2 * HIDDEN + 2 * 2 * 4 * VOCABULARY  # P fixed: the basis needs no gradient
    assert counts[1] - counts[0] == 8 * (per_token + shortcut)


def test_a_fine_mesh_is_not_multiplied_by():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> object:
            return type("Output", (), {"loss": self.linear(x).sum()})

    counts = {
        n_nodes: flops(
            get_peft_model(
                Layer(), LRegConfig(target_modules=["linear"], weighting="factored", n_components=4, n_nodes=n_nodes)
            ),
            {"x": torch.randn(50, HIDDEN), "labels": torch.zeros(1)},
        )
        for n_nodes in (64, 1024)
    }
    assert counts[64] == counts[1024]


class Written(TorchDispatchMode):
    """Notes which operations make a tensor of a given size, and not another view of one."""

    def __init__(self, n_entries: int) -> None:
        super().__init__()
        self.n_entries, self.names = n_entries, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if result.numel() == self.n_entries and result.data_ptr() not in given:
            self.names.append(func.__name__.split(".")[0])
        return result


@pytest.mark.parametrize("base_width", [None, 8])
def test_features_and_their_gradient_are_passed_over_once(base_width):
    projection, features = Projection(32, 2, base_width), torch.randn(5, 7, 32, requires_grad=True)
    with Written(features.numel()) as written:
        projection(features).sum().backward()
    assert written.names == ["mm"]  # the gradient; a factor would be another one


class TallOnTheRight(TorchDispatchMode):
    """Notes products whose right factor is tall, thin and row by row: CPUs need several times as long for these."""

    def __init__(self) -> None:
        super().__init__()
        self.n_products, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            right = args[1]
            self.n_products += 1
            if right.shape[1] == 2 and right.is_contiguous():
                self.found.append((tuple(args[0].shape), tuple(right.shape)))
        return func(*args, **(kwargs or {}))


def test_products_of_the_backward_pass_are_those_that_a_cpu_is_fast_at():
    torch.manual_seed(0)
    config = LRegConfig(target_modules=["0"], n_components=2, n_nodes=8, weighting="factored", linear_term=True)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 48)), config)
    loss = model(torch.randn(5, 7, 32, requires_grad=True)).sum()
    with TallOnTheRight() as products:
        loss.backward()
    assert products.n_products == 5  # one of the frozen layer, two of each map
    assert not products.found
