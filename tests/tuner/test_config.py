"""Every field of the configuration: values, messages, JSON."""

import dataclasses
import json

import pytest
from peft import PeftConfig

from lreg_peft import LRegConfig

EVERYTHING = {
    "preset": "paper",
    "task_type": "CAUSAL_LM",
    "n_components": 3,
    "n_nodes": 4,
    "base_width": 64,
    "weighting": "factored",
    "linear_term": True,
    "profile_mean": 0.25,
    "profile_mean_pattern": {"lm_head": 1.0},
    "target_modules": ["a", "b"],
    "exclude_modules": ["c"],
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers"],
    "modules_to_save": ["head"],
    "component_pattern": {"a": 5},
    "node_pattern": {r"layers\.\d": 6},
    "feature_sizes": {"b": (7, 8)},
    "layout": {"b": "channels_first"},
    "readout": "mean",
    "feature_source": {"b": "stem"},
    "init_weights": False,
    "trainable_token_indices": {"embed": [3, 4]},
    "train_projection": False,
    "backbone_eval": True,
    "fused_loss": True,
    "curvature_weight": 0.25,
    "previous_grades": ["first", "second"],
    "grade_form": "composed",
}

REFUSED = [
    ({"linear_term": 1, "weighting": "factored"}, TypeError, "linear_term must be True or False, got 1"),
    ({"linear_term": True}, ValueError, "linear_term=True needs weighting='factored'.*got weighting='full'"),
    (
        {"profile_mean": float("nan"), "weighting": "factored"},
        ValueError,
        "profile_mean must be a finite number, got nan",
    ),
    (
        {"profile_mean": 0},
        ValueError,
        "profile_mean acts on the profiles of weighting='factored', got weighting='full'",
    ),
    (
        {"profile_mean_pattern": {"a": "b"}, "weighting": "factored"},
        ValueError,
        r"profile_mean_pattern\['a'\] must be a finite number, got 'b'",
    ),
    ({"n_components": 0}, ValueError, "n_components must be at least 1, got 0"),
    ({"n_components": -2}, ValueError, "n_components must be at least 1, got -2"),
    ({"n_components": 2.0}, TypeError, "n_components must be a whole number, got 2.0"),
    ({"n_components": True}, TypeError, "n_components must be a whole number, got True"),
    ({"n_components": None}, TypeError, "n_components must be a whole number, got None"),
    ({"n_nodes": 1}, ValueError, "n_nodes must be at least 2, got 1"),
    ({"n_nodes": "4"}, TypeError, "n_nodes must be a whole number, got '4'"),
    ({"weighting": "whole"}, ValueError, "weighting must be one of full, reduced, factored, got 'whole'"),
    ({"target_modules": 3}, TypeError, "target_modules must be a list of module names, got 3"),
    ({"target_modules": [1]}, ValueError, "target_modules must hold non-empty module names"),
    ({"target_modules": [""]}, ValueError, "target_modules must hold non-empty module names"),
    ({"target_modules": ""}, ValueError, "target_modules must be a non-empty string"),
    ({"target_modules": "a("}, ValueError, "target_modules='a\\(' is not a valid regular expression"),
    ({"exclude_modules": "["}, ValueError, "exclude_modules='\\[' is not a valid regular expression"),
    ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules must be a list"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of module names, got 'head'"),
    ({"modules_to_save": [None]}, ValueError, "modules_to_save must hold non-empty module names"),
    (
        {"target_modules": ["a", "b"], "modules_to_save": ["b"]},
        ValueError,
        r"\['b'\] stand in both target_modules and modules_to_save",
    ),
    (
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        ValueError,
        "layers_to_transform needs target_modules as a list of names, got target_modules='all-linear'",
    ),
    ({"layers_pattern": "h"}, ValueError, "layers_pattern='h' only has an effect together with layers_to_transform"),
    ({"component_pattern": {"a": 0}}, ValueError, r"component_pattern\['a'\] must be at least 1, got 0"),
    ({"component_pattern": {"a(": 1}}, ValueError, "component_pattern key='a\\(' is not a valid regular expression"),
    ({"node_pattern": {"a": 1}}, ValueError, r"node_pattern\['a'\] must be at least 2, got 1"),
    ({"node_pattern": {"": 3}}, ValueError, "node_pattern key must be a non-empty string"),
    ({"feature_sizes": {"a": 3}}, ValueError, r"feature_sizes\['a'\] must be a pair \(in_features, out_features\)"),
    ({"feature_sizes": {"a": (3, 4, 5)}}, ValueError, r"feature_sizes\['a'\] must be a pair"),
    ({"feature_sizes": {"a": (0, 4)}}, ValueError, r"feature_sizes\['a'\] in_features must be at least 1, got 0"),
    ({"feature_sizes": {"a": (1, 4.0)}}, TypeError, r"feature_sizes\['a'\] out_features must be a whole number"),
    ({"task_type": "IMAGE_CLASSIFICATION"}, ValueError, "leave task_type out.*modules_to_save=.*'classifier'"),
    ({"layout": "NCHW"}, ValueError, "layout must be one of channels_first, tokens, grid, vector, got 'NCHW'"),
    ({"layout": {"a": None}}, ValueError, r"layout\['a'\] must be one of .*, got None"),
    ({"layout": {"(": "tokens"}}, ValueError, "layout key='\\(' is not a valid regular expression"),
    ({"readout": "last"}, ValueError, "readout must be one of mean, first, got 'last'"),
    ({"readout": ["mean"]}, ValueError, r"readout must be one of mean, first, got \['mean'\]"),
    (
        {"feature_source": "stem"},
        TypeError,
        "feature_source must be a dictionary with a key for each module, got 'stem'",
    ),
    ({"node_pattern": [3]}, TypeError, r"node_pattern must be a dictionary with a key for each module, got \[3\]"),
    ({"feature_source": {"a": 3}}, ValueError, r"feature_source\['a'\] must be the name of a module, got 3"),
    ({"feature_source": {"": "b"}}, ValueError, "feature_source key must be a non-empty string"),
    ({"init_weights": "random"}, ValueError, "init_weights must be True, False, .*'pca'.*, got 'random'"),
    ({"train_projection": 1}, TypeError, "train_projection must be True or False, got 1"),
    ({"backbone_eval": None}, TypeError, "backbone_eval must be True or False, got None"),
    ({"fused_loss": "no"}, TypeError, "fused_loss must be True or False, got 'no'"),
    (
        {"fused_loss": True, "dropout": 0.5},
        ValueError,
        "fused_loss=True computes the loss without dropout, got dropout=0.5",
    ),
    ({"curvature_weight": "0.1"}, TypeError, "curvature_weight must be a number, got '0.1'"),
    ({"curvature_weight": True}, TypeError, "curvature_weight must be a number, got True"),
    ({"curvature_weight": -0.1}, ValueError, "curvature_weight must be finite and not negative, got -0.1"),
    ({"curvature_weight": float("nan")}, ValueError, "curvature_weight must be finite and not negative, got nan"),
    ({"curvature_weight": float("inf")}, ValueError, "curvature_weight must be finite and not negative, got inf"),
    ({"dropout": True}, TypeError, "dropout must be a number, got True"),
    ({"dropout": 1.0}, ValueError, r"dropout must be at least 0 and less than 1, got 1\.0"),
    ({"dropout": float("nan")}, ValueError, "dropout must be at least 0 and less than 1, got nan"),
    ({"trainable_token_indices": 3}, ValueError, "trainable_token_indices must be a list of different token ids.*3"),
    ({"trainable_token_indices": [3, 3]}, ValueError, r"different token ids.*got \[3, 3\]"),
    ({"trainable_token_indices": [-1]}, ValueError, r"whole numbers from 0 on.*got \[-1\]"),
    ({"trainable_token_indices": {"wte": []}}, ValueError, r"got \{'wte': \[\]\}"),
    ({"target_parameters": ["experts.up"]}, ValueError, r"\['experts\.up'\] names weights.*in target_modules, such"),
    ({"previous_grades": "default"}, TypeError, "previous_grades must be a list"),
    ({"previous_grades": ["a", "a"]}, ValueError, r"every adapter once, got \['a', 'a'\]"),
    ({"grade_form": "nested"}, ValueError, "grade_form must be one of additive, composed, got 'nested'"),
    ({"preset": "lora"}, ValueError, "preset must be one of 'recommended', 'paper', got 'lora'"),
    *(
        ({name: value}, ValueError, f"{name}=.* needs target_modules, or preset='paper'")
        for name, value in {
            "n_components": 4,
            "weighting": "reduced",
            "component_pattern": {"a": 1},
            "node_pattern": {"a": 3},
            "layers_to_transform": [1],
        }.items()
    ),
    ({"r": 8}, TypeError, r"r=8 is LoRA's rank.*n_components"),
    ({"lora_alpha": 16}, TypeError, "lora_alpha=16.*learning rate"),
    ({"lora_dropout": 0.1}, TypeError, "lora_dropout=0.1.*dropout="),
    ({"grade_form": "composed"}, ValueError, "reads the basis of a previous grade, and previous_grades is empty"),
    (
        {"curvature_weight": 0.1, "n_nodes": 2},
        ValueError,
        "has nothing to act on: a mesh of n_nodes=2 has no interior node",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        LRegConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERYTHING,
        {"target_modules": ("a", "b")},
        {"target_modules": r"layers\.\d+\.mlp"},
        {"layers_to_transform": 1, "target_modules": ["a"], "layers_pattern": "h"},
        {"preset": "paper", "layers_to_transform": [1]},
        {"preset": "paper", "curvature_weight": 1, "n_nodes": 2, "node_pattern": {"mlp": 3}},
        {"init_weights": "pca"},
        {"trainable_token_indices": [3, 4]},
        {"trainable_token_indices": None},
        {"target_parameters": None},
        {"feature_sizes": {"a": [3, 4]}},
        {"preset": "paper", "component_pattern": {"a": 1}},
    ],
)
def test_accepts(options):
    LRegConfig(**options)


def test_every_field_has_a_description_once():
    own = [f for f in dataclasses.fields(LRegConfig) if f.name in LRegConfig.__annotations__]
    assert {f.name for f in own} >= set(EVERYTHING) - {"task_type"}
    for item in own:
        assert LRegConfig.__doc__.count(f"\n        {item.name}: ") == 1
        assert item.metadata["help"] in LRegConfig.__doc__


def test_everything_is_covered_here():
    """A new field must join the round trip below."""
    own = {f.name for f in dataclasses.fields(LRegConfig) if f.name in LRegConfig.__annotations__}
    assert own == set(EVERYTHING) - {"task_type"} | {"dropout"}  # which fused_loss refuses
    defaults = LRegConfig()
    assert not [name for name, value in EVERYTHING.items() if getattr(defaults, name) == value]


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"dropout": 0.25}], ids=["defaults", "everything", "dropout"])
def test_json_round_trip(options, tmp_path):
    config = LRegConfig(**options)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    for loaded in (LRegConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LRegConfig
        # What PEFT writes differently on purpose: an adapter is loaded for inference, by its full type name.
        ignored = {"inference_mode", "peft_type", "peft_version"}
        found, expected = dataclasses.asdict(loaded), dataclasses.asdict(config)
        assert {k: v for k, v in found.items() if k not in ignored} == {
            k: v for k, v in expected.items() if k not in ignored
        }
        assert loaded.peft_type == config.peft_type
    assert content["peft_type"] == "LREG"
    assert content["trainable_token_indices"] == options.get("trainable_token_indices", {})


def test_sets_are_saved_in_one_order():
    assert LRegConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]


def test_pairs_from_json_become_tuples():
    assert LRegConfig(feature_sizes={"a": [3, 4]}).feature_sizes == {"a": (3, 4)}


def test_defaults_are_not_shared():
    one, other = LRegConfig(), LRegConfig()
    one.node_pattern["a"] = 3
    assert other.node_pattern == {}


def test_the_callers_containers_are_not_changed():
    sizes, names = {"a": [3, 4]}, ["a"]
    config = LRegConfig(feature_sizes=sizes, target_modules=names)
    config.target_modules.append("b")
    assert sizes == {"a": [3, 4]}
    assert names == ["a"]


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="degrees"):
        LRegConfig(degrees=3)


def test_file_with_a_bad_value_is_refused(tmp_path):
    LRegConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_nodes": 1}))
    with pytest.raises(ValueError, match="n_nodes must be at least 2, got 1"):
        PeftConfig.from_pretrained(tmp_path)
