"""Saving an adapter over an earlier one, killed at any operation: what is left loads, or is refused with the reason."""

import os

import kills
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from tiers import slow

from lreg_peft import LRegConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


def adapted(seed: int) -> PeftModel:
    model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", n_nodes=4))
    tiny.shake(model, seed=seed)
    return model


@pytest.mark.parametrize("at_most", [5, *slow(12)])
def test_a_kill_leaves_the_old_adapter_the_new_one_or_an_error(tmp_path, at_most):
    old, new = adapted(1), adapted(2)
    (tmp_path / "count").mkdir()
    old.save_pretrained(tmp_path / "count")
    total = kills.count_operations(lambda: new.save_pretrained(tmp_path / "count"), tmp_path / "count")
    expected = [tiny.outputs(model) for model in (old, new)]
    outcomes = []
    for instant in kills.instants(total, at_most):
        folder = tmp_path / str(instant)
        folder.mkdir()
        old.save_pretrained(folder)
        kills.kill_at(lambda folder=folder: new.save_pretrained(folder), folder, instant)
        outcomes.append(_what_loads(folder, expected))
        new.save_pretrained(folder)
        assert _what_loads(folder, expected) == "new"
    assert {"old"} <= set(outcomes) <= {"old", "new", "refused"}


def _what_loads(folder, expected) -> str:
    base = tiny.gpt2()
    before = tiny.state(base)
    try:
        loaded = PeftModel.from_pretrained(base, folder)
    except (ValueError, OSError):  # JSON that ends early is a ValueError, too
        return "refused" if tiny.same_state(before, tiny.state(base)) else "half-loaded"
    return ["old", "new"][[torch.equal(tiny.outputs(loaded), each) for each in expected].index(True)]
