"""What earlier versions wrote is read: adapters, grades and checkpoints give the same logits; a cache is refused."""

import shutil
from pathlib import Path

import make_files
import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import lreg_peft

FILES = Path(__file__).parent / "files"
EXPECTED = load_file(FILES / "expected.safetensors")
OLDEST = sorted(make_files.CONFIGS.keys() - {"linear"} | {"grades"})
LOGITS = {
    FILES: dict(zip(OLDEST, EXPECTED["logits"], strict=True)),
    FILES / "before-0.2": load_file(FILES / "before-0.2" / "expected.safetensors"),
}
# Sums of a few hundred products in fp32, in an order that may differ between processors.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
versions = pytest.mark.parametrize("folder", LOGITS, ids=["0.1", "before 0.2"])
adapters = pytest.mark.parametrize(
    ("folder", "name"),
    [(folder, name) for folder, all_of_it in LOGITS.items() for name in all_of_it if name != "grades"],
)


def same_logits(model: torch.nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(model.eval()(make_files.inputs()).logits, expected, **TOLERANCE)


@adapters
def test_adapters(folder, name):
    same_logits(PeftModel.from_pretrained(make_files.base(), folder / name), LOGITS[folder][name])
    assert not torch.allclose(make_files.base()(make_files.inputs()).logits, LOGITS[folder][name], atol=0.1)


@adapters
def test_beside_another_adapter_and_as_a_state_dict(folder, name):
    options = {"task_type": "CAUSAL_LM", **make_files.CONFIGS[name]}
    model = get_peft_model(make_files.base(), lreg_peft.LRegConfig(preset="paper", **options), adapter_name="other")
    model.load_adapter(folder / name, "old")
    model.set_adapter("old")
    same_logits(model, LOGITS[folder][name])
    set_peft_model_state_dict(model, load_file(folder / name / "adapter_model.safetensors"), adapter_name="other")
    model.set_adapter("other")
    same_logits(model, LOGITS[folder][name])


@adapters
def test_saved_again_they_are_files_of_today(folder, name, tmp_path):
    PeftModel.from_pretrained(make_files.base(), folder / name).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.partition("lreg_")[2] for key in keys} <= {
        "projection.weight",
        "projection.bias",
        "encoder.nodes",
        "encoder.weight",
        "coefficients.weight",
    }
    same_logits(PeftModel.from_pretrained(make_files.base(), tmp_path), LOGITS[folder][name])


@versions
def test_grades(folder):
    same_logits(lreg_peft.load_grades(make_files.base(), folder / "grades"), LOGITS[folder]["grades"])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", make_files.CHECKPOINTS)
def test_checkpoints_of_the_whole_model(name, strict):
    folder = FILES / "before-0.2"
    options = {"task_type": "CAUSAL_LM", **make_files.CONFIGS[name]}
    model = get_peft_model(make_files.base(), lreg_peft.LRegConfig(preset="paper", **options))
    checkpoint = load_file(folder / f"{name}-checkpoint.safetensors")
    if strict:
        checkpoint = {**{k: v for k, v in model.state_dict().items() if "lreg_" not in k}, **checkpoint}
    model.load_state_dict(checkpoint, strict=strict)
    same_logits(model, LOGITS[folder][name])


def test_old_files_are_checked_too(tmp_path):
    folder = FILES / "before-0.2"
    model = get_peft_model(
        make_files.base(), lreg_peft.LRegConfig(preset="paper", task_type="CAUSAL_LM", **make_files.CONFIGS["full"])
    )
    for change, message in (
        (lambda state: state.pop("base_model.model.lm_head.lreg_nodes"), "lacks .*nodes"),
        (lambda state: state["base_model.model.lm_head.lreg_coefficients"].fill_(torch.nan), "not finite numbers"),
        (lambda state: state["base_model.model.lm_head.lreg_nodes"].mul_(2), "must span"),
    ):
        state = load_file(folder / "full" / "adapter_model.safetensors")
        change(state)
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, state)
    assert all(layer.is_identity("default") for layer in model.modules() if isinstance(layer, lreg_peft.LRegLayer))


def test_a_cache_is_refused_and_built_again(tmp_path):
    """Its format is no longer read; the new one holds the same rows, up to the last bit of bf16."""
    shutil.copytree(FILES / "cache", tmp_path / "cache")
    model = get_peft_model(make_files.base(), lreg_peft.LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3))
    inputs = {"data": DataLoader(make_files.samples(), 2), "path": tmp_path / "cache", "show_progress": False}
    for call in (lambda: lreg_peft.FeatureCache(tmp_path / "cache"), lambda: lreg_peft.cache_features(model, **inputs)):
        with pytest.raises(ValueError, match=r"another version of lreg_peft.*build it again"):
            call()
    cache = lreg_peft.cache_features(model, **inputs, overwrite=True)
    rows = cache.collate([cache[i] for i in range(len(cache))])
    torch.testing.assert_close(rows["features"], EXPECTED["features"], rtol=2**-7, atol=1e-5)
    assert torch.equal(rows["labels"], EXPECTED["labels"])
    assert not list(cache.path.glob("*.bin"))
