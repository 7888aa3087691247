"""Rows of a shortcut on a model's output: what the model's own loss is made of."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lreg_peft import LRegConfig
from lreg_peft.fitting.output_layer import find_output_layer, trained_elsewhere
from lreg_peft.rows import find_pairing, logits_of, loss_of, row_loss

IDS = torch.randint(3, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.cat((IDS[:, :6], torch.full((3, 3), 2)), dim=1)  # 2 is the padding token
CLASSES = torch.tensor([0, 2, 1])


def token_labels() -> torch.Tensor:
    labels = IDS.clone()
    labels[0, 3:] = -100
    return labels


def adapted(model: nn.Module, *targets: str, **options) -> nn.Module:
    config = LRegConfig(preset="paper", target_modules=list(targets) or None, init_weights=False, **options)
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
    output = find_output_layer(model)
    rows = output.rows(batch)
    assert rows.features.shape == (n, tiny.HIDDEN)
    assert rows.targets.shape[0] == n
    assert not rows.features.requires_grad
    assert model.training
    assert output.layer.training
    model.eval()
    loss = row_loss(output.pairing.loss_kind, output.output(rows.features), rows.targets)
    with torch.no_grad():
        expected = model(**batch).loss
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_offset_leaves_out_one_adapter_and_keeps_the_others():
    model = adapted(tiny.gpt2())
    model.add_adapter("second", LRegConfig(preset="paper", init_weights=False, n_components=3))
    model.base_model.set_adapter(["default", "second"])
    terminal = find_output_layer(model, "second")
    features = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    plain = terminal.layer.get_base_layer()(features)
    expected = plain + terminal.layer.shortcut("default", features, plain)
    torch.testing.assert_close(terminal.base_output(features), expected, rtol=0, atol=0)
    expected = expected + terminal.layer.shortcut("second", features, plain)
    torch.testing.assert_close(terminal.output(features), expected, rtol=1e-6, atol=1e-6)  # added in one product


def test_a_custom_model_counts_if_it_returns_what_the_module_gives():
    class Ends(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.body, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(self.body(x))) * self.scale

    batch = {"x": torch.randn(7, 4), "labels": torch.randn(7, 2)}
    terminal = find_output_layer(adapted(Ends(1.0), "out"))
    assert terminal.rows(batch).features.shape == (7, 6)
    assert terminal.loss_kind(batch["labels"]) == "squared_error"
    with pytest.raises(ValueError, match=r"changes what '.*' gives before it is the output"):
        find_output_layer(adapted(Ends(2.0), "out")).rows(batch)
    with pytest.raises(ValueError, match="2 outputs, but a sample has 3"):
        terminal.rows({"x": batch["x"], "labels": torch.randn(7, 3)})


def test_a_model_that_scales_its_logits_is_refused():
    model = adapted(tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=0.5))
    with pytest.raises(ValueError, match=r"changes what '.*' gives before it is the output"):
        find_output_layer(model).rows({"input_ids": IDS, "labels": IDS})


def test_what_is_not_terminal_is_refused():
    with pytest.raises(ValueError, match="inside the network"):
        find_output_layer(adapted(tiny.gpt2(), "mlp"))
    with pytest.raises(ValueError, match=r"'transformer.h.0.mlp' and 2 more modules"):
        find_output_layer(adapted(tiny.gpt2(), "mlp", "lm_head"))
    with pytest.raises(ValueError, match="no LReg adapter called 'other'"):
        find_output_layer(adapted(tiny.gpt2()), "other")


def test_a_shortcut_that_reads_another_module_is_refused_for_that():
    model = adapted(tiny.gpt2(), "lm_head", feature_source={"lm_head": "transformer.h.0"})
    with pytest.raises(ValueError, match=r"'lm_head' has the feature_source 'transformer\.h\.0': do without"):
        find_output_layer(model)


def test_wrong_batches_are_refused():
    terminal = find_output_layer(adapted(tiny.build("bert", "SEQ_CLS", num_labels=3), "classifier"))
    with pytest.raises(TypeError, match="got list"):
        terminal.rows([IDS])
    with pytest.raises(ValueError, match="needs 'labels'"):
        terminal.rows({"input_ids": IDS})
    with pytest.raises(ValueError, match=r"Expected input batch_size \(3\) to match target batch_size \(2\)"):
        terminal.rows({"input_ids": IDS, "labels": torch.tensor([0, 1])})
    decoder = find_output_layer(adapted(tiny.build("gpt2", "SEQ_CLS", num_labels=3), "score"))
    decoder.model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token is defined"):
        decoder.rows({"input_ids": IDS, "labels": CLASSES})


def test_labels_outside_the_outputs_are_named():
    terminal = find_output_layer(adapted(tiny.build("bert", "TOKEN_CLS", num_labels=3), "classifier"))
    labels = torch.zeros_like(IDS)
    terminal.rows({"input_ids": IDS, "labels": labels})
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\].*got 5"):
        terminal.rows({"input_ids": IDS, "labels": labels + 5})


def test_what_trains_elsewhere_is_found():
    model = adapted(tiny.gpt2())
    terminal = find_output_layer(model)
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


def mean_over_samples(logits, labels):
    losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def sum_over_size(logits, labels):
    return in_place(logits, labels, reduction="sum") / labels.numel()


class TestComparison:
    """Which label belongs to which row is what gives the model's own loss of the first batch."""

    @pytest.mark.parametrize(("loss", "n"), [(shifted, 21), (in_place, 24)])
    def test_a_plain_dictionary_and_either_pairing(self, loss, n):
        output = find_output_layer(adapted(Plain(loss), "out"))
        rows = output.seen_rows(SMALL)
        assert len(rows.targets) == n
        assert output.pairing == (loss is shifted, "cross_entropy")
        assert rows.samples.tolist() == [i for i in range(3) for _ in range(n // 3)]

    def test_losses_by_hand(self):
        def by_hand(logits, labels):
            return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean()

        assert len(find_output_layer(adapted(Plain(by_hand), "out")).rows(SMALL).targets) == 24

    def test_a_subclass_with_another_name(self):
        class Mine(transformers.GPT2LMHeadModel):
            pass

        model = Mine(tiny.gpt2().config)
        output = find_output_layer(adapted(model, task_type="CAUSAL_LM"))
        assert len(output.rows({"input_ids": IDS, "labels": token_labels()}).targets) == 18

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
        output = find_output_layer(adapted(Multi(), "out"))
        output.rows(batch)
        assert output.loss_kind(batch["labels"]) == "binary_cross_entropy"

    @pytest.mark.parametrize(
        "loss",
        [
            lambda logits, labels: shifted(logits, labels, weight=torch.tensor([1.0] * 6 + [1.01] + [1.0] * 6)),
            lambda logits, labels: in_place(logits, labels, label_smoothing=0.01),
            lambda logits, labels: in_place(logits, labels.masked_fill(labels == 6, -100)),
            lambda logits, labels: in_place(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean(),
            lambda logits, labels: (
                in_place(logits, labels) - 1e-4 * torch.distributions.Categorical(logits=logits).entropy().mean()
            ),
            lambda logits, labels: in_place(logits, labels, reduction="sum") / 23.9,
            lambda logits, labels: in_place(logits, labels) * 1.0001,
            mean_over_samples,
            sum_over_size,
        ],
    )
    def test_another_loss_is_refused(self, loss):
        with pytest.raises(ValueError, match=r"^the loss of Plain is not the cross entropy of its outputs averaged"):
            find_output_layer(adapted(Plain(loss), "out")).rows({**SMALL, "labels": RAGGED})

    def test_one_pass_for_a_batch_and_one_loss_in_all(self):
        losses, passes = [], []
        model = adapted(Plain(lambda *inputs: losses.append(1) or in_place(*inputs)), "out")
        model.get_base_model().embed.register_forward_hook(lambda *inputs: passes.append(1))
        output = find_output_layer(model)
        output.rows({**SMALL, "labels": torch.full((3, 8), -100)})  # shows nothing
        for _ in range(3):
            output.rows(SMALL)
        assert (len(passes), len(losses)) == (4, 2)

    @pytest.mark.parametrize(
        ("answer", "loss", "logits"),
        [
            (lambda loss, logits: {"loss": loss, "logits": logits}, True, True),
            (lambda loss, logits: (loss, logits, ()), True, True),
            (lambda loss, logits: (logits,), False, True),
            (lambda loss, logits: logits, False, True),
            (lambda loss, logits: loss, True, False),
            (lambda loss, logits: transformers.modeling_outputs.CausalLMOutput(loss, logits), True, True),
        ],
        ids=["dictionary", "tuple", "tuple without", "logits", "loss", "object"],
    )
    def test_outputs_are_read_in_one_way(self, answer, loss, logits):
        values, scalar = torch.randn(2, 3), torch.tensor(1.5)
        output = answer(scalar, values)
        assert (loss_of(output) is scalar, logits_of(output) is values) == (loss, logits)

    def test_models_that_return_tuples(self):
        output = find_output_layer(adapted(tiny.gpt2()))
        batch = {"input_ids": IDS, "labels": token_labels(), "return_dict": False}
        assert len(output.rows(batch).targets) == 18
        with pytest.raises(ValueError, match="the loss of GPT2LMHeadModel is not the cross entropy"):
            find_pairing(output.model, torch.randn(3, 9, 61), IDS, torch.tensor(1.0))

    def test_under_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            find_output_layer(adapted(tiny.gpt2())).rows({"input_ids": IDS, "labels": token_labels()})

    def test_objects_of_the_user_stay_as_they_are(self):
        model = adapted(tiny.gpt2())
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(input_ids=IDS[:, :4], past_key_values=cache)
        batch = {"input_ids": IDS, "labels": IDS, "past_key_values": cache, "attention_mask": torch.ones(3, 13).long()}
        terminal = find_output_layer(model)
        terminal.rows(batch)
        terminal.rows(batch)
        assert cache.get_seq_length() == 4

    def test_another_adapter_on_the_head_has_its_part(self):
        lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=2))
        with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
            model = adapted(lora.get_base_model(), task_type="CAUSAL_LM")
        terminal = find_output_layer(model)
        terminal.rows({"input_ids": IDS, "labels": token_labels()})
        for trains in (False, True):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lreg_" in name or (trains and "lora_" in name))
            assert ["lora_" in name for name in trained_elsewhere(terminal)] == [True, True] * trains
