"""After training: label frequencies in closed form. It pays or is left out; all or nothing; the rest stays as it is."""

import pytest
import tiny
import torch
from peft import get_peft_model
from test_label_shift import WEIGHTINGS, as_expected, loss_on, skewed

from lreg_peft import LRegConfig, match_token_frequencies
from lreg_peft.training import label_shift


def trained(steps=6, rate=3e-3, **options):
    """On skewed text, far too little to have learned its frequencies."""
    torch.manual_seed(0)
    config = {"task_type": "CAUSAL_LM", "target_modules": ["mlp", "lm_head"], **(options or WEIGHTINGS["linear"])}
    model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", **config)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for batch in skewed(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def head_of(model):
    return model.get_base_model().lm_head


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_lowers_the_loss_on_unseen_text_and_says_by_how_much(weighting, components):
    model = trained(**WEIGHTINGS[weighting], n_components=components)
    before, unseen = loss_on(model, skewed()), loss_on(model, skewed(seed=9))
    report = match_token_frequencies(model, skewed(), show_progress=False)
    assert report.loss_before == pytest.approx(before, abs=1e-5)
    assert report.loss_after == pytest.approx(loss_on(model, skewed()), abs=1e-5)
    assert report.loss_after < report.heldout_after < report.loss_before - 0.3
    assert loss_on(model, skewed(seed=9)) < unseen - 0.3


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_the_promised_loss_is_that_of_a_scaled_adapter_too(scale):
    model = trained()
    for layer in tiny.layers(model):
        layer.set_scale("default", scale)
    report = match_token_frequencies(model, skewed(), show_progress=False)
    assert report.loss_after == pytest.approx(loss_on(model, skewed()), abs=1e-5)
    assert report.loss_after < report.loss_before - 0.3


def test_tokens_are_expected_as_often_as_they_come():
    model = trained(weighting="full", n_nodes=3)
    ids = torch.cat([batch["input_ids"] for batch in skewed(16)])
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=tiny.VOCABULARY)[3:13]

    @torch.no_grad()
    def error():
        expected = model.eval()(ids).logits[:, :-1].softmax(-1).sum((0, 1))[3:13]
        return (expected / counts - 1).abs().max().item()

    before = error()
    match_token_frequencies(model, skewed(16), show_progress=False)
    assert error() < 0.2 < 0.5 < before


def test_only_the_output_vectors_of_the_head_change():
    model = trained()
    before = tiny.state(model)
    match_token_frequencies(model, skewed(), show_progress=False)
    changed = {name for name, value in tiny.state(model).items() if not torch.equal(value, before[name])}
    assert len(changed) == 1
    assert "lm_head" in changed.pop()
    assert model.training


def test_a_second_time_finds_little():
    model = trained()
    first = match_token_frequencies(model, skewed(), show_progress=False)
    second = match_token_frequencies(model, skewed(), show_progress=False)
    assert second.loss_before - second.loss_after < 0.2 * (first.loss_before - first.loss_after)
    assert second.loss_after <= second.loss_before


def test_left_out_where_there_is_nothing_to_gain():
    model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3))
    ids = skewed()[0]["input_ids"]
    report = match_token_frequencies(model, as_expected(), show_progress=False)
    assert report.loss_after <= report.loss_before
    if report.pseudocount is None:
        assert torch.equal(model.eval()(ids).logits, tiny.gpt2().eval()(ids).logits)


def test_reads_no_more_batches_than_it_is_told():
    model, seen = trained(), []

    def batches():
        for batch in skewed(8):
            seen.append(1)
            yield batch

    match_token_frequencies(model, batches(), n_batches=3, show_progress=False)
    assert len(seen) == 3


def test_many_labels_are_counted_and_few_judge(monkeypatch):
    monkeypatch.setattr(label_shift, "_JUDGES", 32 * 20)
    model = trained()
    before = loss_on(model, skewed())
    report = match_token_frequencies(model, skewed(), show_progress=False)
    assert report.loss_before != pytest.approx(before, abs=1e-6)  # the mean over a sixth of the labels
    assert loss_on(model, skewed()) < before - 0.3


def test_padding_and_ignored_labels_do_not_count():
    batches = skewed()
    padded = []
    for batch in batches:
        ids = torch.cat((batch["input_ids"], torch.zeros(8, 5, dtype=torch.long)), dim=1)
        labels = torch.cat((batch["labels"], torch.full((8, 5), -100)), dim=1)
        padded.append({"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()})
    one, other = trained(), trained()
    plain = match_token_frequencies(one, batches, show_progress=False)
    ignoring = match_token_frequencies(other, padded, show_progress=False)
    assert ignoring.loss_after == pytest.approx(plain.loss_after, abs=1e-5)
    torch.testing.assert_close(head_of(one).table("default"), head_of(other).table("default"), rtol=1e-4, atol=1e-5)


def test_other_active_adapters_are_taken_as_they_are():
    model = trained()
    model.add_adapter("second", LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], n_nodes=3))
    model.base_model.set_adapter(["default", "second"])
    first = head_of(model).table("default").clone()
    before = loss_on(model, skewed())
    report = match_token_frequencies(model, skewed(), adapter_name="second", show_progress=False)
    assert report.loss_before == pytest.approx(before, abs=1e-5)
    assert loss_on(model, skewed()) == pytest.approx(report.loss_after, abs=1e-5)
    assert torch.equal(head_of(model).table("default"), first)
    with pytest.raises(ValueError, match=r"adapter_name must be one of the active adapters .* got None"):
        match_token_frequencies(model, skewed(), show_progress=False)


def test_half_precision():
    model = trained().bfloat16()
    report = match_token_frequencies(model, skewed(), show_progress=False)
    assert loss_on(model, skewed()) == pytest.approx(report.loss_after, abs=0.03)
    assert report.loss_after < report.loss_before - 0.3


def _switched_off(model):
    model.base_model.disable_adapter_layers()


def _scaled(model):
    inner = model.get_base_model()
    own = inner.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * 0.5
        if kwargs.get("labels") is not None:
            output.loss = inner.loss_function(output.logits, kwargs["labels"], vocab_size=tiny.VOCABULARY)
        return output

    inner.forward = forward


def _spoilt(model):
    head_of(model).base_layer.register_forward_hook(lambda module, args, output: output * torch.nan)


NONE = [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)} for IDS in [skewed()[0]["input_ids"]]]
REFUSED = {
    "without a shortcut on the head": ({"target_modules": ["mlp"]}, None, skewed(), "add the head to target_modules"),
    "switched off": ({}, _switched_off, skewed(), r"active adapters on the output head, \[\], got None"),
    "logits changed behind the head": ({}, _scaled, skewed(), "changes what 'lm_head' gives before it is the output"),
    "NaN": ({}, _spoilt, skewed(), "a calibration of the output needs finite logits, and some of .* are NaN"),
    "no batches": ({}, None, [], r"a calibration of the output needs labels, and there are none: no batches"),
    "ignored labels": ({}, None, NONE, r"ignored \(-100\)"),
    "no labels": ({}, None, [{"input_ids": NONE[0]["input_ids"]}], "needs batches with labels that are classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(case):
    options, spoil, batches, message = REFUSED[case]
    model = trained(**options)
    if spoil is not None:
        spoil(model)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=message):
        match_token_frequencies(model, batches, show_progress=False)
    assert tiny.same_state(before, tiny.state(model))


def test_a_batch_that_is_no_dictionary():
    with pytest.raises(TypeError, match="a batch must be a dictionary of model inputs by name, got Tensor"):
        match_token_frequencies(trained(), [skewed()[0]["input_ids"]], show_progress=False)


def test_warns_where_the_start_from_data_was_promised():
    model = get_peft_model(
        tiny.gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3, init_weights="pca")
    )
    with pytest.warns(UserWarning, match="not called before the calibration"):
        match_token_frequencies(model, skewed(), show_progress=False)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model = trained()
    before = tiny.state(model)
    own = label_shift.F.cross_entropy
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(label_shift.F, "cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        match_token_frequencies(model, skewed(), show_progress=False)
    assert tiny.same_state(before, tiny.state(model))
