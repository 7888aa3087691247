"""One line to the right configuration: placements, sizes that fill a budget, round trips, what is refused."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from lreg_peft import inspect_targets, recommended_config


def meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def gpt2():
    return meta(GPT2LMHeadModel, GPT2Config(bos_token_id=0, eos_token_id=1))


class TestPlacement:
    def test_language_model(self):
        targets = {t.name: t for t in inspect_targets(gpt2(), recommended_config(gpt2()))}
        assert len(targets) == 4 * 12 + 2
        assert targets["transformer.ln_f"].n_components == 4
        assert targets["lm_head"].n_components == targets["transformer.h.3.mlp.c_fc"].n_components == 1
        assert targets["transformer.h.3.attn.c_proj"].n_components == 2

    def test_without_the_output_head(self):
        names = [t.name for t in inspect_targets(gpt2(), recommended_config(gpt2(), output_head=False))]
        assert len(names) == 49
        assert "lm_head" not in names
        assert "transformer.ln_f" in names

    @pytest.mark.parametrize(
        ("model_type", "task", "norm"),
        [
            ("llama", "CAUSAL_LM", "model.norm"),
            ("opt", "CAUSAL_LM", "model.decoder.final_layer_norm"),
            ("gpt_neox", "CAUSAL_LM", "gpt_neox.final_layer_norm"),
            ("t5", "SEQ_2_SEQ_LM", "decoder.final_layer_norm"),
            ("roberta", None, None),  # its norm is part of the output head
            ("gpt2", "SEQ_CLS", None),
            ("bert", "SEQ_CLS", None),
        ],
    )
    def test_the_norm_before_the_output_head(self, model_type, task, norm):
        base = tiny.build(model_type, task or "MASKED_LM")
        names = [t.name for t in inspect_targets(base, recommended_config(base, task_type=task))]
        assert [name for name in names if "norm" in name.lower() or "ln_f" in name] == [norm] * (norm is not None)
        without = recommended_config(base, task_type=task, final_norm=False)
        assert [t.name for t in inspect_targets(base, without)] == [name for name in names if name != norm]

    def test_classifiers_train_their_head_in_full_and_poolers_are_left_alone(self):
        model = meta(RobertaForSequenceClassification, RobertaConfig(num_hidden_layers=2))
        config = recommended_config(model, task_type="SEQ_CLS")
        targets = {t.name: t.n_components for t in inspect_targets(model, config)}
        assert len(targets) == 12
        assert all(name.startswith("roberta.encoder.layer.") for name in targets)
        # "output.dense" is an ending of "attention.output.dense" as well.
        assert targets["roberta.encoder.layer.0.attention.output.dense"] == 2
        assert targets["roberta.encoder.layer.0.output.dense"] == 1

    @pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "opt", "phi3", "gpt_neo"])
    def test_other_architectures_train_as_they_are(self, model_type):
        base = tiny.build(model_type, "CAUSAL_LM")
        model = get_peft_model(base, recommended_config(base, task_type="CAUSAL_LM", init_weights=True))
        ids = torch.randint(3, tiny.VOCABULARY, (2, 8))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        directions = {n: p for n, p in model.named_parameters() if "lreg_coefficients" in n}
        assert len(directions) > 8
        assert all(p.grad is not None and p.grad.any() for p in directions.values())

    def test_profiles_start_at_one_on_the_head_only(self):
        model = get_peft_model(tiny.gpt2(), recommended_config(tiny.gpt2(), init_weights=True))
        means = {n: p.mean().item() for n, p in model.named_parameters() if "lreg_encoder" in n}
        inside = {value for name, value in means.items() if "lm_head" not in name}
        (head,) = [value for name, value in means.items() if "lm_head" in name]
        assert head == 1.0
        assert max(inside) < 1


class TestBudget:
    @pytest.mark.parametrize("budget", [60_000, 100_000, 254_434, 294_912, 1_000_000])
    def test_is_filled_and_never_exceeded(self, budget):
        report = inspect_targets(gpt2(), recommended_config(gpt2(), budget))
        # What is left does not pay for one component of the cheapest module.
        assert budget - (768 + 1 + 8 + 768) < report.trainable_parameters <= budget

    @pytest.mark.parametrize(("share", "adapted"), [(0.69, True), (0.71, False)])
    def test_the_output_head_comes_first_where_it_leaves_three_tenths(self, share, adapted):
        component = 768 + 1 + 8 + 50_257
        names = {t.name for t in inspect_targets(gpt2(), recommended_config(gpt2(), round(component / share)))}
        assert ("lm_head" in names) == adapted
        assert len(names) > 5

    def test_the_norm_gets_a_quarter_of_what_the_head_leaves_up_to_sixteen_components(self):
        counts = {}
        for budget in (40_000, 75_000, 2_000_000):
            targets = {t.name: t for t in inspect_targets(gpt2(), recommended_config(gpt2(), budget))}
            counts[budget] = targets["transformer.ln_f"].n_components
        component = 768 + 1 + 8 + 768
        head = 768 + 1 + 8 + 50_257
        quarters = [round(rest / 4 / component) for rest in (40_000, 75_000 - head)]
        assert list(counts.values()) == [*quarters, 16]

    def test_what_does_not_pay_for_all_layers_goes_to_the_attention(self):
        names = {t.name for t in inspect_targets(gpt2(), recommended_config(gpt2(), 20_000))}
        assert not any(".mlp." in name for name in names)
        assert "transformer.h.11.attn.c_attn" in names

    def test_shares_are_kept_as_far_as_sizes_allow(self):
        targets = inspect_targets(gpt2(), recommended_config(gpt2(), 2_000_000))
        attention = [t.n_components for t in targets if ".attn." in t.name]
        feed_forward = [t.n_components for t in targets if ".mlp." in t.name]
        assert max(attention) - min(attention) <= 1
        assert max(feed_forward) - min(feed_forward) <= 1
        assert sum(attention) / sum(feed_forward) == pytest.approx(2, rel=0.2)

    @pytest.mark.parametrize(
        ("text", "options"), [("lora:8", {"r": 8}), ("lora:4:c_fc", {"r": 4, "target_modules": "c_fc"})]
    )
    def test_as_many_as_lora(self, text, options):
        base = gpt2()
        options = {k: [v] if k == "target_modules" else v for k, v in options.items()}
        lora = get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **options))
        wanted = lora.get_nb_trainable_parameters()[0]
        report = inspect_targets(base, recommended_config(base, text))
        assert wanted - 2_000 < report.trainable_parameters <= wanted

    def test_what_it_says_is_what_trains(self):
        base = tiny.gpt2()
        config = recommended_config(base, 1_500)
        expected = inspect_targets(base, config).trainable_parameters
        assert get_peft_model(base, config).get_nb_trainable_parameters()[0] == expected <= 1_500


def test_the_configuration_survives_its_file(tmp_path):
    config = recommended_config(gpt2(), 300_000)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert [(t.name, t.n_components) for t in inspect_targets(gpt2(), again)] == [
        (t.name, t.n_components) for t in inspect_targets(gpt2(), config)
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"budget": 10},
            ValueError,
            "budget=10 .* does not pay for one component: the cheapest, at 'transformer.*give at least that",
        ),
        ({"budget": "lora"}, ValueError, "budget must be a number, 'lora:RANK'.* got 'lora'"),
        ({"budget": "lora:0"}, ValueError, "budget must be a number.* got 'lora:0'"),
        ({"budget": "lora:2:nothing"}, ValueError, "LoRA has nothing to adapt"),
        ({"budget": 2.5}, TypeError, "budget must be a number of parameters or a text"),
        ({"n_nodes": 1}, ValueError, "n_nodes must be at least 2, got 1"),
        ({"target_modules": ["mlp"]}, ValueError, r"chooses \['target_modules'\] itself"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        recommended_config(gpt2(), **options)


def test_refuses_adapted_and_unknown_models():
    with pytest.raises(ValueError, match="wants the base model and got one with adapters"):
        recommended_config(get_peft_model(tiny.gpt2(), recommended_config(tiny.gpt2(), init_weights=True)))
    with pytest.raises(ValueError, match="Linear has no linear layers in repeated blocks"):
        recommended_config(torch.nn.Linear(3, 3))


def test_layers_that_are_named_by_a_number_alone():
    network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    targets = inspect_targets(network, recommended_config(network, budget=1700))
    assert [target.name for target in targets] == ["0", "2", "4"]
    assert 1600 < sum(target.trainable_parameters for target in targets) <= 1700
