"""An adapted model as a graph of its own, without Python: `torch.export`, saved, loaded, run at another length."""

import io

import pytest
import tiny
import torch
from peft import get_peft_model
from tiers import slow

from lreg_peft import LRegConfig, recommended_config


def example(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def recipe():
    base = tiny.gpt2(use_cache=False)
    return get_peft_model(base, recommended_config(base, 2500, task_type="CAUSAL_LM"))


MODELS = {
    "gpt2, the recipe": recipe,
    "roberta, full weighting": lambda: tiny.adapt(tiny.roberta(), target_modules=["query", "dense"], n_nodes=4),
    "roberta, blocks": lambda: get_peft_model(
        tiny.roberta(), LRegConfig(target_modules=["output"], weighting="reduced")
    ),
}


@pytest.mark.parametrize("name", ["roberta, blocks", *slow("gpt2, the recipe", "roberta, full weighting")])
def test_a_saved_graph_computes_the_same_at_every_length(name):
    model = MODELS[name]()
    tiny.shake(model)
    model = model.get_base_model().double().eval()
    length = torch.export.Dim("length", min=2, max=32)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (), example(9), dynamic_shapes=shapes), file)
    file.seek(0)
    graph = torch.export.load(file).module()
    for size in (5, 17):
        with torch.no_grad():
            expected = model(**example(size)).logits
            # In fp64: the curve is made of single operations in a graph, and rounds otherwise.
            torch.testing.assert_close(graph(**example(size)).logits, expected, rtol=1e-8, atol=1e-8)
