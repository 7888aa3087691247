"""Rows of a terminal shortcut: what a model's own loss is made of."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lreg_peft import LRegConfig
from lreg_peft.fitting.output_shortcut import find_terminal, trained_elsewhere
from lreg_peft.labels import row_loss

IDS = torch.randint(3, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.cat((IDS[:, :6], torch.full((3, 3), 2)), dim=1)  # 2 is the padding token
CLASSES = torch.tensor([0, 2, 1])


def token_labels() -> torch.Tensor:
    labels = IDS.clone()
    labels[0, 3:] = -100
    return labels


def adapted(model: nn.Module, *targets: str, **options) -> nn.Module:
    config = LRegConfig(target_modules=list(targets) or None, init_weights=False, **options)
    return get_peft_model(model, config).train()


CASES = {
    "gpt2": (lambda: adapted(tiny.gpt2()), IDS, token_labels(), 18),
    "llama": (lambda: adapted(tiny.llama()), IDS, token_labels(), 18),
    "roberta": (lambda: adapted(tiny.roberta()), IDS, token_labels(), 21),
    "bert": (lambda: adapted(tiny.build("bert", "MASKED_LM")), IDS, token_labels(), 21),
    "bert tokens": (
        lambda: adapted(tiny.build("bert", "TOKEN_CLS", num_labels=tiny.VOCABULARY), "classifier"),
        IDS,
        token_labels(),
        21,
    ),
    **{
        f"{kind} {what}": (
            lambda kind=kind, options=options: adapted(
                tiny.build(kind, "SEQ_CLS", **options), "score" if kind in ("gpt2", "llama") else "classifier"
            ),
            PADDED,
            labels,
            3,
        )
        for kind in ("roberta", "bert", "gpt2", "llama")
        for what, options, labels in (
            ("classes", {"num_labels": 3}, CLASSES),
            ("value", {"num_labels": 1}, CLASSES.float()),
            ("labels", {"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(3)),
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_rows_give_the_loss_of_the_model(name):
    build, ids, labels, n = CASES[name]
    model = build()
    batch = {"input_ids": ids, "attention_mask": (ids != 2).long(), "labels": labels}
    terminal = find_terminal(model)
    objective = terminal.check(batch)
    rows = terminal.rows(batch)
    assert rows.features.shape == (n, tiny.HIDDEN)
    assert rows.targets.shape[0] == n
    assert not rows.features.requires_grad
    assert model.training
    assert terminal.layer.training
    loss = row_loss(objective, terminal.base_output(rows.features, without=()), rows.targets)
    with torch.no_grad():
        expected = model.eval()(**batch).loss
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_offset_leaves_out_one_adapter_and_keeps_the_others():
    model = adapted(tiny.gpt2())
    model.add_adapter("second", LRegConfig(init_weights=False, n_components=3))
    model.base_model.set_adapter(["default", "second"])
    terminal = find_terminal(model, "second")
    features = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    plain = terminal.layer.get_base_layer()(features)
    expected = plain + terminal.layer.shortcut("default", features, plain)
    torch.testing.assert_close(terminal.base_output(features), expected, rtol=0, atol=0)
    torch.testing.assert_close(terminal.base_output(features, without=("default", "second")), plain, rtol=0, atol=0)


def test_a_custom_model_counts_if_it_returns_what_the_module_gives():
    class Ends(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.body, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(self.body(x))) * self.scale

    batch = {"x": torch.randn(7, 4), "labels": torch.randn(7, 2)}
    terminal = find_terminal(adapted(Ends(1.0), "out"))
    assert terminal.check(batch) == "squared_error"
    assert terminal.rows(batch).features.shape == (7, 6)
    with pytest.raises(ValueError, match="changes the output of this module"):
        find_terminal(adapted(Ends(2.0), "out")).check(batch)
    with pytest.raises(ValueError, match=r"8 outputs|2 outputs, but a sample has 3"):
        terminal.check({"x": batch["x"], "labels": torch.randn(7, 3)})


def test_a_model_that_scales_its_logits_is_refused():
    model = adapted(tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=0.5))
    with pytest.raises(ValueError, match="changes the output of this module"):
        find_terminal(model).check({"input_ids": IDS, "labels": IDS})


def test_what_is_not_terminal_is_refused():
    with pytest.raises(ValueError, match="inside the network"):
        find_terminal(adapted(tiny.gpt2(), "mlp"))
    with pytest.raises(ValueError, match=r"'transformer.h.0.mlp' and 2 more modules"):
        find_terminal(adapted(tiny.gpt2(), "mlp", "lm_head"))
    with pytest.raises(ValueError, match="no LReg adapter called 'other'"):
        find_terminal(adapted(tiny.gpt2()), "other")


def test_a_shortcut_that_reads_another_module_is_refused_for_that():
    model = adapted(tiny.gpt2(), "lm_head", feature_source={"lm_head": "transformer.h.0"})
    with pytest.raises(ValueError, match=r"'lm_head' has the feature_source 'transformer\.h\.0': do without"):
        find_terminal(model)


def test_wrong_batches_are_refused():
    terminal = find_terminal(adapted(tiny.build("bert", "SEQ_CLS", num_labels=3), "classifier"))
    with pytest.raises(TypeError, match="got list"):
        terminal.rows([IDS])
    with pytest.raises(ValueError, match="needs 'labels'"):
        terminal.rows({"input_ids": IDS})
    with pytest.raises(ValueError, match="fit neither"):
        terminal.rows({"input_ids": IDS, "labels": torch.tensor([0, 1])})
    decoder = find_terminal(adapted(tiny.build("gpt2", "SEQ_CLS", num_labels=3), "score"))
    decoder.model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"Set model\.config\.pad_token_id"):
        decoder.rows({"input_ids": IDS, "labels": CLASSES})


def test_labels_outside_the_outputs_are_named():
    terminal = find_terminal(adapted(tiny.build("bert", "TOKEN_CLS", num_labels=3), "classifier"))
    labels = torch.zeros_like(IDS)
    terminal.check({"input_ids": IDS, "labels": labels})
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\].*got 5"):
        terminal.check({"input_ids": IDS, "labels": labels + 5})


def test_what_trains_elsewhere_is_found():
    model = adapted(tiny.gpt2())
    terminal = find_terminal(model)
    assert trained_elsewhere(terminal) == []
    terminal.model.transformer.h[0].ln_1.bias.requires_grad_(True)
    terminal.layer.get_base_layer().weight.requires_grad_(True)  # tied to the embedding, which names it first
    assert trained_elsewhere(terminal) == ["transformer.wte.weight", "transformer.h.0.ln_1.bias"]


class Plain(nn.Module):
    """A language model of one's own, with a plain dictionary as its output."""

    def __init__(self, loss, *, classes: int = 13) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(13, 6), nn.Linear(6, classes)
        self.loss = loss

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.out(torch.tanh(self.embed(ids)))
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def shifted(logits, labels, **options):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def in_place(logits, labels, **options):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


SMALL = {"ids": torch.arange(24).view(3, 8) % 13, "labels": torch.arange(3, 27).view(3, 8) % 7}


RAGGED = SMALL["labels"].masked_fill(torch.arange(24).view(3, 8) < 3, -100)


class Padded(Plain):
    """One that takes a mask."""

    def forward(self, ids, labels=None, attention_mask=None):
        logits = self.out(torch.tanh(self.embed(ids)))
        loss = None if labels is None else self.loss(logits, labels, attention_mask)
        return {"loss": loss, "logits": logits}


def mean_over_samples(logits, labels, mask):
    losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def sum_over_size(logits, labels, mask):
    return in_place(logits, labels, reduction="sum") / labels.numel()


def mean_over_mask(logits, labels, mask):
    return nn.functional.cross_entropy(logits[mask.bool()], labels[mask.bool()])


#: Losses that are a mean over rows where all samples count alike, and what shows that they are not.
UNEVEN = {
    "samples": (mean_over_samples, {"labels": RAGGED}),
    "size": (sum_over_size, {"labels": RAGGED}),
    "mask": (mean_over_mask, {"attention_mask": (RAGGED != -100).long()}),
}


class TestTheModelIsAsked:
    """Names say nothing: which label belongs to which row is what gives the model's own loss."""

    @pytest.mark.parametrize(("loss", "n"), [(shifted, 21), (in_place, 24)])
    def test_a_plain_dictionary_and_either_pairing(self, loss, n):
        terminal = find_terminal(adapted(Plain(loss), "out"))
        assert len(terminal.rows(SMALL).targets) == n
        assert terminal.check(SMALL) == "cross_entropy"
        assert terminal.rows_per_sample(SMALL["labels"]) == [n // 3] * 3

    def test_losses_by_hand(self):
        def by_hand(logits, labels):
            return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean()

        assert find_terminal(adapted(Plain(by_hand), "out")).check(SMALL) == "cross_entropy"

    def test_a_subclass_with_another_name(self):
        class Mine(transformers.GPT2LMHeadModel):
            pass

        model = Mine(tiny.gpt2().config)
        batch = {"input_ids": IDS, "labels": token_labels()}
        terminal = find_terminal(adapted(model, task_type="CAUSAL_LM"))
        assert terminal.check(batch) == "cross_entropy"
        assert len(terminal.rows(batch).targets) == 18

    def test_labels_with_several_values(self):
        class Multi(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(4, 3)

            def forward(self, x, labels=None):
                logits = self.out(x)
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels) if labels is not None else None
                return {"loss": loss, "logits": logits}

        batch = {"x": torch.randn(5, 4), "labels": torch.eye(5)[:, :3]}
        assert find_terminal(adapted(Multi(), "out")).check(batch) == "binary_cross_entropy"

    @pytest.mark.parametrize(
        "loss",
        [
            lambda logits, labels: shifted(
                logits, labels, weight=torch.tensor([1.0] * 12 + [20.0])
            ),  # not in the batch
            lambda logits, labels: in_place(logits, labels, label_smoothing=0.01),
            lambda logits, labels: in_place(logits, labels, ignore_index=11),
            lambda logits, labels: in_place(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean(),
            lambda logits, labels: (
                in_place(logits, labels) - 1e-4 * torch.distributions.Categorical(logits=logits).entropy().mean()
            ),
            lambda logits, labels: in_place(logits, labels, reduction="sum") / 23.9,
            lambda logits, labels: in_place(logits, labels) * 1.0001,
        ],
    )
    def test_another_loss_is_refused(self, loss):
        with pytest.raises(ValueError, match="weights its loss by more than the labels"):
            find_terminal(adapted(Plain(loss), "out")).check(SMALL)

    @pytest.mark.parametrize("name", UNEVEN)
    def test_what_a_loss_averages_over_is_seen_at_the_first_uneven_batch(self, name):
        loss, change = UNEVEN[name]
        terminal = find_terminal(adapted(Padded(loss), "out"))
        even = {**SMALL, "attention_mask": torch.ones(3, 8).long()}
        terminal.check_what_is_new(even, terminal.rows(even))
        uneven = {**even, **change}
        with pytest.raises(ValueError, match="weights its loss by more than the labels"):
            terminal.check_what_is_new(uneven, terminal.rows(uneven))

    def test_a_mean_over_samples_of_plain_losses_is_seen_before(self):
        def by_sample(logits, labels):
            return sum(nn.functional.cross_entropy(logits[i], labels[i]) for i in range(3)) / 3

        with pytest.raises(ValueError, match="weights its loss by more than the labels"):
            find_terminal(adapted(Plain(by_sample), "out")).check(SMALL)

    def test_batches_that_show_nothing_new_are_not_run_again(self):
        calls = []
        terminal = find_terminal(adapted(Plain(lambda *inputs: calls.append(1) or in_place(*inputs)), "out"))
        counts = []
        for labels in (SMALL["labels"], SMALL["labels"], RAGGED, RAGGED, SMALL["labels"]):
            batch = {**SMALL, "labels": labels}
            rows = terminal.rows(batch)
            calls.clear()
            terminal.check_what_is_new(batch, rows)
            counts.append(len(calls))
        assert counts == [2, 0, 1, 0, 0]

    def test_a_plain_cross_entropy_is_recognised_at_once(self):
        calls = []
        model = adapted(tiny.gpt2())
        own = model.get_base_model().loss_function
        model.get_base_model().loss_function = lambda *args, **inputs: calls.append(1) or own(*args, **inputs)
        find_terminal(model).rows({"input_ids": IDS, "labels": token_labels()})
        assert len(calls) == 2  # seen once, computed once; not once for every set of classes

    def test_under_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            find_terminal(adapted(tiny.gpt2())).check({"input_ids": IDS, "labels": token_labels()})

    def test_objects_of_the_user_stay_as_they_are(self):
        model = adapted(tiny.gpt2())
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(input_ids=IDS[:, :4], past_key_values=cache)
        batch = {"input_ids": IDS, "labels": IDS, "past_key_values": cache, "attention_mask": torch.ones(3, 13).long()}
        terminal = find_terminal(model)
        terminal.check(batch)
        terminal.rows(batch)
        assert cache.get_seq_length() == 4

    def test_another_adapter_on_the_head_has_its_part(self):
        lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=2))
        with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
            model = adapted(lora.get_base_model(), task_type="CAUSAL_LM")
        terminal = find_terminal(model)
        terminal.check({"input_ids": IDS, "labels": token_labels()})
        for trains in (False, True):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lreg_" in name or (trains and "lora_" in name))
            assert ["lora_" in name for name in trained_elsewhere(terminal)] == [True, True] * trains
