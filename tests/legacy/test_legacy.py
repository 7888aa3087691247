"""What version 0.1.0 wrote is read: adapters and grades give the same logits, a cache is refused."""

import shutil
from pathlib import Path

import make_files
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import lreg_peft

FILES = Path(__file__).parent / "files"
EXPECTED = load_file(FILES / "expected.safetensors")
LOGITS = dict(zip(sorted([*make_files.CONFIGS, "grades"]), EXPECTED["logits"], strict=True))
# Sums of a few hundred products in fp32, in an order that may differ between processors.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", make_files.CONFIGS)
def test_adapters(name):
    model = PeftModel.from_pretrained(make_files.base(), FILES / name)
    torch.testing.assert_close(model(make_files.inputs()).logits, LOGITS[name], **TOLERANCE)
    assert not torch.allclose(make_files.base()(make_files.inputs()).logits, LOGITS[name], atol=0.1)


def test_grades():
    model = lreg_peft.load_grades(make_files.base(), FILES / "grades")
    torch.testing.assert_close(model(make_files.inputs()).logits, LOGITS["grades"], **TOLERANCE)


def test_a_cache_is_refused_and_built_again(tmp_path):
    """Its format is no longer read; the new one holds the same rows, up to the last bit of bf16."""
    shutil.copytree(FILES / "cache", tmp_path / "cache")
    model = get_peft_model(make_files.base(), lreg_peft.LRegConfig(task_type="CAUSAL_LM", dof=3))
    inputs = {"data": make_files.samples(), "path": tmp_path / "cache", "batch_size": 2, "show_progress": False}
    for call in (lambda: lreg_peft.FeatureCache(tmp_path / "cache"), lambda: lreg_peft.cache_features(model, **inputs)):
        with pytest.raises(ValueError, match=r"another version of lreg_peft.*build it again"):
            call()
    cache = lreg_peft.cache_features(model, **inputs, overwrite=True)
    rows = cache.collate([cache[i] for i in range(len(cache))])
    torch.testing.assert_close(rows["features"], EXPECTED["features"], rtol=2**-7, atol=1e-5)
    assert torch.equal(rows["labels"], EXPECTED["labels"])
    assert not list(cache.path.glob("*.bin"))
