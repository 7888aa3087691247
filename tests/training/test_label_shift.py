"""The start of an output shortcut from label frequencies: pays or is left out, all or nothing."""

import pytest
import tiny
import torch
from peft import get_peft_model

from lreg_peft import LRegConfig, LRegLayer, initialize_lreg_weights
from lreg_peft.training import label_shift
from lreg_peft.training.label_shift import PSEUDOCOUNTS

WEIGHTINGS = {
    "full": {"weighting": "full", "n_nodes": 3},
    "reduced": {"weighting": "reduced", "n_nodes": 3},
    "factored": {"weighting": "factored", "n_nodes": 4},
    "linear": {"weighting": "factored", "n_nodes": 4, "linear_term": True},
}


def adapted(**options):
    torch.manual_seed(0)
    config = {"task_type": "CAUSAL_LM", "target_modules": ["mlp", "lm_head"], **WEIGHTINGS["full"], **options}
    return get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", **config))


def skewed(n_batches=4, seed=0):
    """Text of ten frequent tokens: the frequencies of labels are nothing like what a random model expects."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 13, (8, 16), generator=generator) for _ in range(n_batches)]
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def as_expected(n_batches=4):
    """Text that the model itself writes: there is no shift to find, only noise."""
    model = tiny.gpt2().eval()
    batches = []
    for i in range(n_batches):
        torch.manual_seed(i)
        ids = torch.randint(3, tiny.VOCABULARY, (8, 1))
        with torch.no_grad():
            for _ in range(15):
                ids = torch.cat((ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)), dim=1)
        batches.append({"input_ids": ids, "labels": ids})
    return batches


@torch.no_grad()
def loss_on(model, batches):
    return sum(model.eval()(**batch).loss.item() for batch in batches) / len(batches)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_lowers_the_loss_on_unseen_text_and_says_by_how_much(weighting):
    model = adapted(**WEIGHTINGS[weighting])
    before = loss_on(model, skewed())
    report = initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    assert report.loss_before == pytest.approx(before, abs=1e-5)
    assert report.loss_after == pytest.approx(loss_on(model, skewed()), abs=1e-5)
    assert report.loss_after < report.heldout_after < report.loss_before - 0.5
    assert report.pseudocount in PSEUDOCOUNTS
    base = loss_on(tiny.gpt2(), skewed(seed=9))
    assert loss_on(model, skewed(seed=9)) < base - 0.5


def test_the_promised_loss_is_that_of_a_scaled_adapter_too():
    model = adapted()
    (head,) = [layer for layer in tiny.layers(model) if layer.is_output_layer]
    head.set_scale("default", 4.0)
    report = initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    assert report.loss_after == pytest.approx(loss_on(model, skewed()), abs=1e-5)
    assert report.loss_after < report.loss_before - 0.5


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_labels_are_paired_as_the_model_pairs_them(task_type):
    """Without a task type PEFT wraps the model in a class whose name says nothing."""
    model = adapted(task_type=task_type)
    before = loss_on(model, skewed())
    report = initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    assert report.loss_before == pytest.approx(before, abs=1e-5)


def test_a_model_in_training_is_judged_without_dropout():
    reports = []
    for mode in (True, False):
        model = adapted(**WEIGHTINGS["linear"], dropout=0.5).train(mode)
        head = model.get_base_model().lm_head
        head.base_layer.register_forward_hook(lambda module, args, out: out * torch.nan if module.training else None)
        reports.append(initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False))
        assert model.training is mode
    assert reports[0] == reports[1]


@pytest.mark.parametrize("method", ["pca", "gradient"])
def test_no_pass_is_added(method):
    model, passes = adapted(), []
    model.get_base_model().transformer.register_forward_hook(lambda *args: passes.append(1))
    initialize_lreg_weights(model, skewed(), method=method, start_head=True, show_progress=False)
    assert len(passes) == len(skewed())


@pytest.mark.parametrize("n_ignored", [0, 1])
def test_refused_where_the_loss_is_another_one(n_ignored):
    """A batch without labels that count shows nothing of the loss."""
    model = adapted()
    inner = model.get_base_model()
    inner.loss_function = lambda logits, labels, **options: 2 * logits.square().mean()
    nothing = {name: torch.full_like(ids, -100) if name == "labels" else ids for name, ids in skewed(1)[0].items()}
    batches = [nothing] * n_ignored + skewed()
    with pytest.raises(
        ValueError, match=r"loss of GPT2LMHeadModel is not the cross entropy of its outputs averaged over the labels"
    ):
        initialize_lreg_weights(model, batches, start_head=True, method="pca", show_progress=False)


def test_a_full_head_gets_the_closed_form(monkeypatch):
    monkeypatch.setattr(label_shift, "PSEUDOCOUNTS", (3.0,))
    model = adapted()
    initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    counts, expected = torch.zeros(2, tiny.VOCABULARY)
    with torch.no_grad():
        for batch in skewed():
            logits = tiny.gpt2().eval()(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            expected += logits.softmax(-1).sum(0)
            counts += torch.bincount(batch["labels"][:, 1:].flatten(), minlength=tiny.VOCABULARY)
        ids = skewed(seed=5)[0]["input_ids"]
        shift = model.eval()(ids).logits - tiny.gpt2().eval()(ids).logits
    expected_shift = ((counts + 3) / (expected + 3)).log().expand_as(shift)
    torch.testing.assert_close(shift, expected_shift, rtol=1e-4, atol=1e-4)


def test_left_out_where_there_is_nothing_to_gain():
    model = adapted()
    report = initialize_lreg_weights(model, as_expected(), start_head=True, show_progress=False)
    assert report.pseudocount is None or report.loss_before - report.heldout_after < 0.02
    ids = skewed()[0]["input_ids"]
    if report.pseudocount is None:
        assert report.loss_after == report.loss_before
        assert torch.equal(model.eval()(ids).logits, tiny.gpt2().eval()(ids).logits)


def test_without_it_the_function_stays():
    model = adapted(**WEIGHTINGS["linear"])
    assert initialize_lreg_weights(model, skewed(), method="gradient", show_progress=False) is None
    ids = skewed()[0]["input_ids"]
    assert torch.equal(model.eval()(ids).logits, tiny.gpt2().eval()(ids).logits)


def test_refused_without_a_shortcut_on_the_head():
    model = adapted(target_modules=["mlp"])
    before = tiny.state(model)
    with pytest.raises(ValueError, match=r"start_head=True is about a shortcut on the output head .* target_modules"):
        initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    assert tiny.same_state(before, tiny.state(model))


def test_a_failure_while_the_shift_is_written_leaves_the_model_as_it_was(monkeypatch):
    model = adapted(init_weights="pca")
    before = tiny.state(model)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(LRegLayer, "set_table", fail)
    with pytest.raises(KeyboardInterrupt):
        initialize_lreg_weights(model, skewed(), start_head=True, show_progress=False)
    assert tiny.same_state(before, tiny.state(model))
    assert all("default" in layer.needs_data_init for layer in tiny.layers(model))


def test_labels_that_never_count():
    model = adapted()
    ids = skewed()[0]["input_ids"]
    batches = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}] * 2
    with pytest.raises(ValueError, match=r"a start of '.*lm_head' needs labels.*ignored \(-100\)"):
        initialize_lreg_weights(model, batches, method="pca", start_head=True, show_progress=False)
