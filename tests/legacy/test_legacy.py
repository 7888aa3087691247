"""What version 0.1.0 wrote is read: adapters and grades give the same logits, a cache the same rows."""

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


def test_cache_is_opened_and_not_built_again(tmp_path, monkeypatch):
    shutil.copytree(FILES / "cache", tmp_path / "cache")
    written = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    model = get_peft_model(make_files.base(), lreg_peft.LRegConfig(task_type="CAUSAL_LM", dof=3))
    cache = lreg_peft.cache_features(model, make_files.samples(), tmp_path / "cache", batch_size=2, show_progress=False)
    rows = cache.collate([cache[i] for i in range(len(cache))])
    assert torch.equal(rows["features"], EXPECTED["features"])
    assert torch.equal(rows["labels"], EXPECTED["labels"])
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == written
