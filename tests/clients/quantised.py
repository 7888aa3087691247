"""What is checked of every quantised base: an adapter trains on it, saves without it, and loads onto it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import load, moved, saved_causal_lm, shortcut_state, texts, tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from lreg_peft import LRegConfig


def check(quantise: Callable, targets: list[str], hidden: int = 64) -> str:
    """`quantise(folder)` loads the base; the adapter of `targets` lowers its loss and comes back from a file."""
    folder = Path(tempfile.mkdtemp())
    saved_causal_lm(folder / "base", hidden)
    ids = tokenizer()(texts(8), return_tensors="pt").input_ids
    model = get_peft_model(quantise(folder / "base"), LRegConfig(task_type="CAUSAL_LM", target_modules=targets))
    before = shortcut_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert moved(before, model), "some shortcuts did not move"
    assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
    model.save_pretrained(folder / "adapter")
    assert all("lreg_" in key for key in load_file(folder / "adapter" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(quantise(folder / "base"), folder / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 8 steps"


__all__ = ["check", "load"]
