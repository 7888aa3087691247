"""Malformed inputs: each is met by one sentence that names the argument, and leaves the model as it was.

What is promised: values out of range, NaN, infinities, wrong shapes and impossible combinations. An argument of a wrong
type may end in Python's own error.
"""

import inspect
import math

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

import lreg_peft
from lreg_peft import LRegConfig, core


def adapted() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", n_nodes=3))


MODEL = adapted()
IDS = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "labels": IDS}]
NODES = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.5, 1.0]])
COORDS = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
ELEMENT, LOCAL = core.locate(COORDS, NODES)
ROWS = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
CHUNKS = lambda: [core.Chunk(ROWS, torch.tensor([0, 1, 0, 1, 1]))]  # noqa: E731
# Arguments that are right, for everything that is public and can be called.
RIGHT: dict[str, dict] = {
    "cache_features": {"model": MODEL, "data": BATCHES, "path": "never"},
    "add_grade": {"model": MODEL},
    "match_token_frequencies": {"model": MODEL, "data": BATCHES},
    "fit_coefficients": {"model": MODEL, "data": BATCHES},
    "convert_to_lora": {"model": MODEL, "data": BATCHES},
    "initialize_lreg_weights": {"model": MODEL, "data": BATCHES},
    "inspect_targets": {"model": MODEL, "config": LRegConfig(preset="paper")},
    "load_grades": {"model": MODEL, "path": "never"},
    "plot_meshes": {"model": MODEL},
    "recommended_config": {"model": tiny.gpt2()},
    "refine_linearized": {"model": MODEL, "data": BATCHES},
    "save_as_lora": {"path": "never", "model": MODEL, "data": BATCHES},
    "track_statistics": {"model": MODEL},
    "update_meshes": {"model": MODEL},
    "LRegCallback": {},
    "FeatureCache": {"path": "never"},
    "adapt_mesh": {"nodes": NODES, "coefficients": torch.ones(2, 3, 4), "indicator": torch.ones(2, 2)},
    "check_nodes": {"nodes": NODES},
    "core.curvature_penalty": {"nodes": NODES, "coefficients": torch.ones(2, 3, 4)},
    "curvature_penalty": {"model": MODEL},
    "evaluate": {"coords": COORDS, "nodes": NODES, "coefficients": torch.ones(2, 3, 4)},
    "hat_basis": {"coords": COORDS, "nodes": NODES},
    "initial_projection": {"n_components": 2, "in_features": 3},
    "interpolate": {"nodes_old": NODES, "nodes_new": NODES, "values": torch.ones(2, 3, 4)},
    "locate": {"coords": COORDS, "nodes": NODES},
    "quantile_nodes": {"samples": COORDS, "n_nodes": 3},
    "solve_cross_entropy": {"chunks": CHUNKS, "start": torch.zeros(3, 2), "ridge": 0.1},
    "solve_least_squares": {"chunks": CHUNKS, "start": torch.zeros(3, 2)},
    "uniform_nodes": {"n_components": 2, "n_nodes": 3},
}


def public() -> dict:
    """Functions, and classes that users make."""
    found = {}
    for place in (lreg_peft, core):
        for name in place.__all__:
            thing = getattr(place, name)
            if inspect.isfunction(thing) or name in ("LRegCallback", "FeatureCache"):
                found[f"core.{name}" if name in found else name] = thing
    return found


def test_everything_public_is_tried():
    assert public().keys() == RIGHT.keys()


@pytest.fixture(scope="module")
def before():
    return tiny.state(MODEL), [type(module) for module in MODEL.modules()]


OUT_OF_RANGE = [
    ("cache_features", "dtype", torch.int8),
    ("cache_features", "adapter_name", "other"),
    ("add_grade", "form", "nested"),
    ("add_grade", "name", ""),
    ("add_grade", "name", "default"),
    ("fit_coefficients", "ridge", -1.0),
    ("fit_coefficients", "ridge", 0.0),
    ("fit_coefficients", "tolerance", 0.0),
    ("fit_coefficients", "tolerance", -1e-6),
    ("fit_coefficients", "max_passes", 2),
    ("fit_coefficients", "max_passes", -5),
    ("fit_coefficients", "adapter_name", "other"),
    ("fit_coefficients", "max_moves", -1),
    ("match_token_frequencies", "n_batches", 0),
    ("match_token_frequencies", "adapter_name", "other"),
    ("initialize_lreg_weights", "method", "random"),
    ("initialize_lreg_weights", "n_batches", 0),
    ("initialize_lreg_weights", "max_samples", -3),
    ("initialize_lreg_weights", "adapter_name", "other"),
    ("plot_meshes", "max_components", 0),
    ("plot_meshes", "modules", ["nowhere"]),
    ("plot_meshes", "adapter_name", "other"),
    ("refine_linearized", "rank", 0),
    ("refine_linearized", "rank", []),
    ("refine_linearized", "damping", -1.0),
    ("refine_linearized", "damping", []),
    ("refine_linearized", "n_rounds", 0),
    ("refine_linearized", "columns_at_once", 0),
    ("track_statistics", "n_rows", 0),
    ("track_statistics", "n_hard_samples", 0),
    ("update_meshes", "strategy", "none"),
    ("update_meshes", "tolerance", -1.0),
    ("adapt_mesh", "strategy", "none"),
    ("adapt_mesh", "n_refine", -1),
    ("adapt_mesh", "pseudocount", -1.0),
    ("adapt_mesh", "size", 0.0),
    ("adapt_mesh", "indicator", -torch.ones(2, 2)),
    ("adapt_mesh", "indicator", torch.ones(2, 3)),
    ("adapt_mesh", "coefficients", torch.ones(2, 4, 4)),
    ("adapt_mesh", "nodes", NODES.flip(1)),
    ("check_nodes", "nodes", NODES / 0),
    ("check_nodes", "nodes", NODES[:, :1]),
    ("evaluate", "coords", torch.ones(5, 3)),
    ("evaluate", "coords", COORDS * torch.nan),
    ("evaluate", "form", "sparse"),
    ("initial_projection", "n_components", 0),
    ("initial_projection", "in_features", -1),
    ("interpolate", "values", torch.ones(2, 4)),
    ("locate", "coords", COORDS * torch.nan),
    ("quantile_nodes", "n_nodes", 1),
    ("quantile_nodes", "samples", COORDS * torch.inf),
    ("solve_cross_entropy", "ridge", 0.0),
    ("solve_cross_entropy", "ridge", -1.0),
    ("solve_cross_entropy", "targets", "values"),
    ("solve_cross_entropy", "scale", 0.0),
    ("solve_cross_entropy", "tolerance", 0.0),
    ("solve_cross_entropy", "max_passes", 2),
    ("solve_cross_entropy", "start", torch.zeros(3, 2) / 0),
    ("solve_cross_entropy", "start", torch.zeros(3, 0)),
    ("solve_least_squares", "ridge", -1.0),
    ("solve_least_squares", "scale", -1.0),
    ("solve_least_squares", "max_passes", 1),
    ("uniform_nodes", "n_nodes", 1),
    ("uniform_nodes", "n_components", 0),
    ("uniform_nodes", "low", 1.0),
    ("uniform_nodes", "dtype", torch.float16),
]


@pytest.mark.parametrize(("name", "argument", "value"), OUT_OF_RANGE)
def test_values_out_of_range(name, argument, value, before):
    with pytest.raises((ValueError, TypeError)) as caught:
        public()[name](**{**RIGHT[name], argument: value})
    text = str(caught.value)
    words = {"adapter_name": "other", "name": "called", "form": "form", "modules": "nowhere"}.get(argument, argument)
    assert "\n" not in text and len(text) < 500
    assert words in text or argument in text, text
    assert tiny.same_state(before[0], tiny.state(MODEL))


def test_nodes_that_their_precision_does_not_tell_apart():
    with pytest.raises(ValueError, match=r"^5 nodes between low=100000000\.0 and high=100000001\.0"):
        core.uniform_nodes(1, 5, low=1e8, high=1e8 + 1)
    assert (core.uniform_nodes(1, 5, low=1e8, high=1e8 + 1, dtype=torch.float64).diff() > 0).all()


_COUNTS = {"n_components": 1, "n_nodes": 2}
_FLAGS = ("train_projection", "backbone_eval", "fused_loss", "inference_mode", "linear_term")
CONFIGURATIONS = [
    *((name, value) for name in _COUNTS for value in ("2", 2.0, True, [2], torch.ones(2), math.nan)),
    *((name, lowest - 1) for name, lowest in _COUNTS.items()),
    *((name, -3) for name in _COUNTS),
    *((name, value) for name in _FLAGS for value in (1, 0, "yes", None, [True], 0.5)),
    *(("weighting", value) for value in ("fulll", "", None, 1, ["full"], {"full": 1})),
    *(("target_modules", value) for value in (3, True, {"a": 1}, [1], [""], "", "(", 2.5, ["a", None])),
    *(("exclude_modules", value) for value in (3, [None], "", "(", {"a": 1})),
    *(("layers_to_transform", value) for value in (True, "a", [], [True], [1.5], -1, [-1], 0.5, {"a": 1}, ["0"])),
    *(("layers_pattern", value) for value in (3, [1], "(", {"a": 1}, "h")),
    *(("modules_to_save", value) for value in ("head", 3, [1], [""], {"a": 1})),
    *(
        (name, value)
        for name in ("component_pattern", "node_pattern")
        for value in (3, "x", [1], None, {"(": 3}, {1: 3}, {"": 3}, {"a": 0}, {"a": "3"}, {"a": 2.5}, {"a": True})
    ),
    *(
        ("feature_sizes", value)
        for value in (3, "x", [1], None, {"(": (1, 2)}, {"a": 3}, {"a": (1,)}, {"a": (0, 2)}, {"a": ("1", 2)})
    ),
    *(("init_weights", value) for value in ("svd", None, 1, 0, 2.5, ["pca"], "")),
    *(("curvature_weight", value) for value in ("1", None, True, -1.0, math.nan, math.inf, [1.0])),
    *(("curvature_weight", value) for value in (0.5,)),  # n_nodes 2 has no interior node
    *(("previous_grades", value) for value in ("a", 3, [1], [""], ["a", "a"], {"a": 1})),
    *(("grade_form", value) for value in ("nested", None, 3, "composed", ["additive"])),
    *(("profile_mean", value) for value in ("1", None, math.nan, True, 2.0)),
    *(("profile_mean_pattern", value) for value in (3, "x", [1], {"(": 1.0}, {"a": "b"}, {"a": math.inf})),
]


@pytest.mark.parametrize(("name", "value"), CONFIGURATIONS)
def test_configurations(name, value):
    options = {"layers_to_transform": 1} if name == "layers_pattern" and value != "h" else {}
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        LRegConfig(**{"target_modules": ["mlp"], **options, name: value})
    assert "\n" not in str(caught.value)
