"""Every tuner of PEFT has an entry that fits a tiny model, or is listed with the reason."""

from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    utils,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.peft_methods.base_layers import linear_instead_of_conv1d, untie_head
from benchmarks.peft_methods.methods import everything
from benchmarks.peft_methods.site import WITH_HEAD, Site
from benchmarks.peft_methods.study import BudgetTooSmall, StudySizes, fitted
from benchmarks.peft_methods.tuner import quiet
from benchmarks.peft_methods.tuners import LEFT_OUT, TUNERS
from examples.comparison.methods import Fit
from examples.comparison.sizes import count_trainable
from examples.comparison.task import Task

pytestmark = [
    pytest.mark.xdist_group("comparison"),
    # SHiRA's forward pass builds a sparse matrix; torch says so once.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]

BUDGET = 1500
KNOWN = everything()
GPT2 = GPT2Config(
    vocab_size=40,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


class Tiny(Task):
    """A model and nothing to train it on."""

    longest_sample = 8

    def __init__(self, config: PretrainedConfig, task_type: Any, auto_class: Any) -> None:
        self.config, self.task_type, self.auto_class = config, task_type, auto_class

    def load_base(self) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.auto_class.from_config(self.config)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return {}


@pytest.fixture(autouse=True)
def quiet_transformers() -> Any:
    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()
    yield
    utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Tiny]:
    return {
        "CAUSAL_LM": Tiny(GPT2, "CAUSAL_LM", AutoModelForCausalLM),
        "SEQ_CLS": Tiny(BERT, "SEQ_CLS", AutoModelForSequenceClassification),
    }


def batch(task: Tiny) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(3))
    labels = ids if task.task_type == "CAUSAL_LM" else torch.tensor([0, 1, 0, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# Every tuner on one task; some of the others, that train a new head beside the adapter, on the second.
CASES = [
    (tuner.name, task)
    for index, tuner in enumerate(TUNERS)
    for task in ("CAUSAL_LM", "SEQ_CLS")
    if task in tuner.tasks and (task == "CAUSAL_LM" or "CAUSAL_LM" not in tuner.tasks or index % 6 == 0)
]


@pytest.mark.parametrize(("name", "task_type"), CASES, ids=lambda value: value)
def test_the_largest_size_within_the_budget_trains_what_was_counted(
    name: str, task_type: str, tasks: dict[str, Tiny]
) -> None:
    task = tasks[task_type]
    sizes = StudySizes(task, None, steps=10)
    places = [method for method in KNOWN[name] if task_type in method.tasks]
    method, size = fitted(sizes, places, BUDGET)
    count = sizes.count(method, size)
    assert 0 < count <= BUDGET
    if size is not None:
        there = sizes.sizes(method)
        following = there[there.index(size) + 1 :][:1]
        assert all(sizes.count(method, larger) > BUDGET for larger in following)
    assert method.place != WITH_HEAD or task_type == "CAUSAL_LM"
    data = batch(task)
    model = method.attach(task.load_base(), sizes.fit(method, size), [data])
    assert count_trainable(model) == count + sizes.new_parameters
    # The loss may be one that a custom trainer replaces; what matters is that everything counted can learn.
    model.train()
    model(**data).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    for module in task.new_modules:
        assert any(module in n for n in trained), "the new head must be trained too"


def test_every_tuner_of_peft_has_an_entry_or_a_reason(tasks: dict[str, Tiny]) -> None:
    """PEFT's own list decides: a tuner of a later version must be entered or left out with a reason."""
    task = tasks["CAUSAL_LM"]
    site = Site(linear_instead_of_conv1d(task.empty_model()), Fit(task, size=2), WITH_HEAD)
    with quiet():
        there = {tuner.config(site).peft_type.value for tuner in TUNERS}
    assert set(LEFT_OUT) | there | {"LREG"} >= {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not set(LEFT_OUT) & there


def test_a_budget_too_small_for_every_place_is_told_with_the_least_one(tasks: dict[str, Tiny]) -> None:
    sizes, places = StudySizes(tasks["CAUSAL_LM"]), KNOWN["rslora"]
    with pytest.raises(BudgetTooSmall, match="its smallest size has 64 parameters"):
        fitted(sizes, places, 63)  # on c_proj of both layers: 16 + 16 in each
    method, size = fitted(sizes, places, 191)
    assert (method.place, size) == ("attention output", 2)
    method, size = fitted(sizes, places, 192)  # and on their c_attn: 16 + 48 in each
    assert (method.place, size) == ("attention", 1)


def test_the_base_model_keeps_its_function() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2).eval()
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    changed = untie_head(linear_instead_of_conv1d(model))
    # The product of the same numbers in another layout: rounding of float32 only.
    torch.testing.assert_close(changed(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
    assert changed.lm_head.weight is not changed.transformer.wte.weight
    assert not changed.config.tie_word_embeddings and GPT2.tie_word_embeddings
    assert not any(isinstance(module, Conv1D) for module in changed.modules())


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora-ga", "lora-gradient", "eva", "osf", "psoft"])
def test_starts_leave_the_function_as_it_is_though_the_head_is_tied(name: str, tasks: dict[str, Tiny]) -> None:
    """Directions that leave the weights of a tied head must not leave the embeddings."""
    task, method = tasks["CAUSAL_LM"], KNOWN[name][0]
    base, data = task.load_base().eval(), batch(task)
    before = base(input_ids=data["input_ids"]).logits
    model = method.attach(task.load_base(), StudySizes(task).fit(method, 2), [data])
    after = model.eval()(input_ids=data["input_ids"]).logits
    # Weights are decomposed and put together again in float32.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
