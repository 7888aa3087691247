"""Which modules a configuration adapts: defaults per model type, patterns, indices, refusals."""

import dataclasses

import pytest
import torch
import transformers
from peft import TaskType
from peft.utils.error import NoMatchingPeftModuleError
from tiny import adapt, build, gpt2, inputs, layers, llama, outputs, roberta, same_state, shake, state, trainable
from torch import nn

from lreg_peft import LRegConfig, LRegLayer, inspect_targets, recommended_config

LANGUAGE_MODELS = [
    ("gpt2", "CAUSAL_LM", "lm_head"),
    ("llama", "CAUSAL_LM", "lm_head"),
    ("mistral", "CAUSAL_LM", "lm_head"),
    ("qwen2", "CAUSAL_LM", "lm_head"),
    ("qwen3", "CAUSAL_LM", "lm_head"),
    ("gemma", "CAUSAL_LM", "lm_head"),
    ("gemma2", "CAUSAL_LM", "lm_head"),
    ("phi3", "CAUSAL_LM", "lm_head"),
    ("opt", "CAUSAL_LM", "lm_head"),
    ("gpt_neo", "CAUSAL_LM", "lm_head"),
    ("gpt_neox", "CAUSAL_LM", "lm_head"),
    ("t5", "SEQ_2_SEQ_LM", "lm_head"),
    ("roberta", "MASKED_LM", "lm_head"),
    ("xlm-roberta", "MASKED_LM", "lm_head"),
    ("bert", "MASKED_LM", "cls"),
    ("distilbert", "MASKED_LM", "vocab_projector"),
    ("electra", "MASKED_LM", "generator_lm_head"),
    ("deberta-v2", "MASKED_LM", "cls"),
    ("albert", "MASKED_LM", "predictions"),
]
CLASSIFIERS = [
    ("gpt2", {"c_attn"}, 2),
    ("llama", {"q_proj", "k_proj"}, 4),
    ("mistral", {"q_proj", "k_proj"}, 4),
    ("qwen2", {"q_proj", "k_proj"}, 4),
    ("qwen3", {"q_proj", "k_proj"}, 4),
    ("gemma", {"q_proj", "k_proj"}, 4),
    ("gemma2", {"q_proj", "k_proj"}, 4),
    ("phi3", {"qkv_proj"}, 2),
    ("opt", {"q_proj", "k_proj"}, 4),
    ("gpt_neo", {"q_proj", "k_proj"}, 4),
    ("gpt_neox", {"query_key_value"}, 2),
    ("t5", {"q", "k"}, 12),  # encoder, decoder, and between them
    ("roberta", {"query", "key"}, 4),
    ("xlm-roberta", {"query", "key"}, 4),
    ("bert", {"query", "key"}, 4),
    ("distilbert", {"q_lin", "k_lin"}, 4),
    ("electra", {"query", "key"}, 4),
    ("deberta-v2", {"query_proj", "key_proj"}, 4),
    ("albert", {"query", "key"}, 2),  # its layers share their weights
]


def check_it_learns(model: nn.Module, batch: dict, before: torch.Tensor) -> None:
    shake(model)
    assert not torch.allclose(outputs(model), before)
    model.train()
    result = model(**batch)
    (result.logits if "logits" in result else result[0]).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lreg_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


class TestDefaults:
    @pytest.mark.parametrize(("model_type", "task", "head"), LANGUAGE_MODELS, ids=[m[0] for m in LANGUAGE_MODELS])
    def test_language_model_head(self, model_type, task, head):
        base = build(model_type, task)
        before = outputs(base)
        assert [target.name for target in inspect_targets(base, LRegConfig(preset="paper"))] == [head]
        options = {"task_type": task} if task != "MASKED_LM" else {}
        model = adapt(base, **options)
        assert torch.equal(outputs(model), before)
        (layer,) = layers(model)
        assert (layer.in_features, layer.out_features) == (16, 61)
        check_it_learns(model, inputs(base), before)

    @pytest.mark.parametrize(("model_type", "names", "count"), CLASSIFIERS, ids=[m[0] for m in CLASSIFIERS])
    def test_classification(self, model_type, names, count):
        base = build(model_type, "SEQ_CLS")
        if model_type == "t5":  # its classifier reads the state at the end-of-sequence token
            batch = {"input_ids": torch.cat((inputs(base)["input_ids"], torch.ones(3, 1, dtype=torch.long)), dim=1)}
        else:
            batch = inputs(base)
        report = inspect_targets(base, LRegConfig(preset="paper"))
        assert {target.name.rpartition(".")[2] for target in report} == names
        assert len(report) == count
        with torch.no_grad():
            before = base(**batch).logits
        # PEFT knows the usual names of classification heads, T5's is not among them.
        head = {"modules_to_save": ["classification_head"]} if model_type == "t5" else {}
        model = adapt(base, task_type="SEQ_CLS", **head)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, before)
            shake(model)
            assert not torch.allclose(model(**batch).logits, before)
        model.train()
        model(**batch).logits.square().mean().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lreg_" in name)
        assert any(p.grad is not None for name, p in model.named_parameters() if "modules_to_save" in name)

    @pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
    @pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "llama"])
    def test_other_tasks_of_encoders(self, model_type, task):
        base = build(model_type, task)
        expected = {target.name for target in inspect_targets(base, LRegConfig(preset="paper"))}
        assert expected
        assert {name for name, m in adapt(base, task_type=task).get_base_model().named_modules() if is_adapted(m)} == (
            expected
        )

    def test_image_classification(self):
        base = build("vit", "IMAGE_CLS")
        before = outputs(base)
        model = adapt(base)
        assert [layer.out_features for layer in layers(model)] == [2]  # from the class token to the logits
        assert torch.equal(outputs(model), before)
        check_it_learns(model, inputs(base), before)

    def test_task_is_read_off_the_class_if_none_is_named(self):
        assert len(layers(adapt(roberta("SEQ_CLS")))) == 4
        assert len(layers(adapt(roberta("MASKED_LM")))) == 1

    def test_unknown_type_raises_and_lists_modules(self):
        config = transformers.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7
        )
        with torch.device("meta"):
            model = transformers.Wav2Vec2ForSequenceClassification(config)
        for function in (inspect_targets, lambda m, c: adapt(m, task_type=c.task_type)):
            with pytest.raises(ValueError, match=r"no default target_modules for Wav2Vec2.*q_proj.*"):
                function(model, LRegConfig(preset="paper", task_type="SEQ_CLS"))

    def test_plain_module_raises_and_lists_modules(self):
        with pytest.raises(ValueError, match=r"no default target_modules for Sequential .*for example: 0, 2\."):
            adapt(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LRegLayer)


class TestInspection:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"target_modules": ["mlp", "lm_head"], "n_nodes": 5, "node_pattern": {"lm_head": 3}},
            {"target_modules": "all-linear", "component_pattern": {r"h\.0\.mlp\.c_fc": 7, "c_attn": 1}},
            {"target_modules": ["attn"], "train_projection": False},
            {"target_modules": ["act"], "feature_sizes": {"act": [64, 64]}},
            {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        ],
    )
    def test_its_numbers_are_what_get_peft_model_makes(self, options):
        model, config = gpt2(), LRegConfig(preset="paper", **options)
        before, fields = state(model), dataclasses.asdict(config)
        report = inspect_targets(model, config)
        assert same_state(state(model), before)
        assert not layers(model)
        assert dataclasses.asdict(config) == fields
        adapted = adapt(model, **options)
        assert trainable(adapted) == report.trainable_parameters
        found = {name: m for name, m in adapted.get_base_model().named_modules() if is_adapted(m)}
        assert list(found) == [target.name for target in report]
        for target in report:
            layer = found[target.name]
            assert (target.in_features, target.out_features) == (layer.in_features, layer.out_features)
            assert tuple(layer.lreg_encoder["default"].nodes.shape) == (target.n_components, target.n_nodes)
            assert target.module_type == type(layer.base_layer).__name__
            assert target.trainable_parameters == sum(p.numel() for n, p in layer.named_parameters() if p.requires_grad)

    def test_table(self):
        lines = str(inspect_targets(gpt2(), LRegConfig(target_modules=["mlp"]))).splitlines()
        assert lines[0].split() == ["module", "type", "in", "out", "components", "n_nodes", "trainable"]
        assert lines[1].split() == ["transformer.h.0.mlp", "GPT2MLP", "16", "16", "2", "2", "98"]
        assert lines[-1].split() == ["2", "modules", "196"]
        assert len({len(line) for line in lines}) == 1

    @pytest.mark.parametrize("task_type", ["CAUSAL_LM", TaskType.CAUSAL_LM])
    def test_learning_rate_of_the_recommended_configuration(self, task_type):
        base = gpt2()
        report = inspect_targets(base, recommended_config(base, task_type=task_type))
        assert report.learning_rate == 2e-2
        assert str(report).splitlines()[-1] == "learning rate to try first with Adam: 0.02"
        other = LRegConfig(preset="paper", task_type=task_type)
        assert inspect_targets(base, other).learning_rate is None  # nothing was measured of it

    def test_model_that_already_carries_adapters(self):
        model = adapt(gpt2(), target_modules=["mlp"])
        before = state(model)
        report = inspect_targets(model, LRegConfig(target_modules=["mlp", "attn"]))
        assert [target.module_type for target in report] == ["GPT2Attention", "GPT2MLP"] * 2
        assert same_state(state(model), before)


class TestSelection:
    def names(self, **options):
        report = inspect_targets(gpt2(), LRegConfig(preset="paper", **options))
        adapted = adapt(gpt2(), **options).get_base_model()
        names = [target.name for target in report]
        assert names == [name for name, module in adapted.named_modules() if is_adapted(module)]
        return names

    def test_list_of_names_and_endings(self):
        assert self.names(target_modules=["h.0.mlp", "lm_head"]) == ["transformer.h.0.mlp", "lm_head"]

    def test_regular_expression_matches_whole_names(self):
        assert self.names(target_modules=r".*\.1\.(mlp|attn)\.c_proj") == [
            "transformer.h.1.attn.c_proj",
            "transformer.h.1.mlp.c_proj",
        ]

    def test_all_linear_leaves_the_output_head_out(self):
        names = self.names(target_modules="all-linear")
        assert len(names) == 8
        assert "lm_head" not in names

    def test_exclusion(self):
        assert self.names(target_modules=["c_proj"], exclude_modules=["mlp.c_proj"]) == [
            "transformer.h.0.attn.c_proj",
            "transformer.h.1.attn.c_proj",
        ]
        assert self.names(target_modules=["c_proj"], exclude_modules=r".*\.0\..*") == [
            "transformer.h.1.attn.c_proj",
            "transformer.h.1.mlp.c_proj",
        ]

    @pytest.mark.parametrize("index", [1, [1]])
    @pytest.mark.parametrize("pattern", [None, "h", ["h", "layers"]])
    def test_layer_indices(self, index, pattern):
        assert self.names(target_modules=["c_fc"], layers_to_transform=index, layers_pattern=pattern) == [
            "transformer.h.1.mlp.c_fc"
        ]

    def test_patterns_by_name_ending_and_expression(self):
        options = {
            "target_modules": ["c_fc", "c_attn"],
            "component_pattern": {"c_fc": 3, r"h\.1\.attn\.c_attn": 4},
            "node_pattern": {r".*attn.*": 6},
        }
        sizes = {
            t.name: (t.n_components, t.n_nodes) for t in inspect_targets(gpt2(), LRegConfig(preset="paper", **options))
        }
        assert sizes == {
            "transformer.h.0.attn.c_attn": (2, 6),
            "transformer.h.0.mlp.c_fc": (3, 2),
            "transformer.h.1.attn.c_attn": (4, 6),
            "transformer.h.1.mlp.c_fc": (3, 2),
        }

    def test_key_of_one_module_is_not_taken_for_another(self):
        model = nn.ModuleDict({"lin": nn.Linear(2, 2), "olin": nn.Linear(2, 2)})
        report = inspect_targets(model, LRegConfig(target_modules=["lin", "olin"], node_pattern={"lin": 5}))
        assert [target.n_nodes for target in report] == [5, 2]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"node_pattern": {"c_fx": 3}}, r"node_pattern keys \['c_fx'\] match no adapted module"),
            ({"component_pattern": {"attn": 3}}, r"component_pattern keys \['attn'\] match no adapted module"),
            ({"feature_sizes": {"lm_head": (1, 1)}}, r"feature_sizes keys \['lm_head'\] match no adapted module"),
            ({"target_modules": ["mlp", "mpl"]}, r"target_modules \['mpl'\] match no module"),
        ],
    )
    def test_entries_without_effect_warn(self, options, message):
        config = LRegConfig(**{"target_modules": ["mlp"], **options})
        with pytest.warns(UserWarning, match=message):
            inspect_targets(gpt2(), config)
        with pytest.warns(UserWarning, match=message):
            adapt(gpt2(), **{"target_modules": ["mlp"], **options})

    def test_exclusion_without_effect_warns(self):
        with pytest.warns(UserWarning, match=r"exclude_modules=\['nothing'\] but no modules were excluded"):
            adapt(gpt2(), target_modules=["mlp"], exclude_modules=["nothing"])


class TestFeatureSizes:
    @pytest.mark.parametrize(
        ("builder", "name", "sizes"),
        [
            (gpt2, "transformer.h.0.mlp", (16, 16)),
            (gpt2, "transformer.h.0.attn", (16, 16)),
            (gpt2, "transformer.h.0", (16, 16)),
            (gpt2, "transformer.h.0.mlp.c_fc", (16, 64)),
            (gpt2, "transformer.h.0.attn.c_attn", (16, 48)),
            (llama, "model.layers.0.self_attn", (16, 16)),
            (llama, "model.layers.0.self_attn.k_proj", (16, 8)),
            (llama, "model.layers.0.mlp", (16, 16)),
            (roberta, "lm_head", (16, 61)),
        ],
    )
    def test_read_off_the_module(self, builder, name, sizes):
        (target,) = inspect_targets(builder(), LRegConfig(target_modules=name.replace(".", r"\.")))
        assert (target.in_features, target.out_features) == sizes

    def test_missing_ones_are_asked_for_and_nothing_changes(self):
        model = gpt2()
        before = state(model)
        for options in ({"target_modules": ["act"]}, {"target_modules": ["mlp", "act"]}):
            with pytest.raises(ValueError, match=r"cannot read the feature sizes of 'transformer.h.0.mlp.act' "):
                adapt(model, **options)
            assert same_state(state(model), before)
            assert not layers(model)

    def test_given_ones_win(self):
        config = LRegConfig(target_modules=["mlp"], feature_sizes={"mlp": (16, 3)})
        assert [target.out_features for target in inspect_targets(gpt2(), config)] == [3, 3]


class TestRefusals:
    def check(self, message, error=ValueError, model=None, **options):
        model = model or gpt2()
        before = state(model)
        with pytest.raises(error, match=message):
            inspect_targets(model, LRegConfig(preset="paper", **options))
        with pytest.raises(error, match=message):
            adapt(model, **options)
        assert same_state(state(model), before)
        assert not layers(model)
        assert torch.equal(outputs(model), outputs(gpt2())) if isinstance(model, type(gpt2())) else True

    def test_wrong_name_with_a_close_match(self):
        self.check(r"\['c_atn'\] not found.*Did you mean 'c_attn'", NoMatchingPeftModuleError, target_modules=["c_atn"])

    def test_wrong_name_without_one(self):
        self.check(r"\['zzz'\] not found.* has for example: .*c_attn.*c_fc", target_modules=["zzz"])

    def test_wrong_expression(self):
        self.check(r"not found.* has for example: .*c_attn", target_modules=r"mlp\d+")

    def test_everything_excluded(self):
        self.check(r"outside exclude_modules=\['mlp'\]", target_modules=["mlp"], exclude_modules=["mlp"])

    def test_patterns_whose_order_decides(self):
        """Files keep them in alphabetical order: what was saved would ask for other sizes when it is loaded."""
        clash = {"mlp.c_fc": 3, ".*c_fc": 1}
        with pytest.raises(
            ValueError, match=r"component_pattern has two keys for 'transformer.h.0.mlp.c_fc', 'mlp.c_fc' and"
        ):
            inspect_targets(gpt2(), LRegConfig(target_modules=["c_fc"], component_pattern=clash))
        agreeing = LRegConfig(target_modules=["c_fc"], node_pattern={".*c_fc": 3, "mlp.c_fc": 4})
        assert {target.n_nodes for target in inspect_targets(gpt2(), agreeing)} == {3}

    def test_layers_of_the_default_head(self):
        self.check(r"layers_to_transform has no effect on the default target 'lm_head'", layers_to_transform=[0])

    def test_layer_that_is_not_there(self):
        self.check(r"in layers \[7\]\. The model has", target_modules=["c_fc"], layers_to_transform=[7])

    def test_embedding(self):
        self.check("'transformer.wte' is an embedding", TypeError, target_modules=["wte"])

    def test_module_list(self):
        self.check("'transformer.h' is a ModuleList, which is never called", TypeError, target_modules=["h"])

    def test_integer_weights(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
        self.check("'1' has weights of torch.int8", TypeError, model=model, target_modules=["0", "1"])
