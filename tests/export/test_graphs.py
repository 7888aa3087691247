"""An adapted model as a graph of its own, without Python: `torch.export`, saved, loaded, run at another length."""

import io
import shutil

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


def exported(name: str) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    """A model in fp64, in which a graph of single operations may round otherwise than the model, and its graph."""
    model = MODELS[name]()
    tiny.shake(model)
    model = model.get_base_model().double().eval()
    length = torch.export.Dim("length", min=2, max=32)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    with torch.no_grad():
        return model, torch.export.export(model, (), example(9), dynamic_shapes=shapes)


def compare(graph, model: torch.nn.Module) -> None:
    for size in (5, 17):
        with torch.no_grad():
            expected = model(**example(size)).logits
            torch.testing.assert_close(graph(**example(size)).logits, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["roberta, blocks", *slow("gpt2, the recipe", "roberta, full weighting")])
def test_a_saved_graph_computes_the_same_at_every_length(name):
    model, program = exported(name)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    compare(torch.export.load(file).module(), model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch by itself
def test_a_compiled_package_computes_the_same_at_every_length(tmp_path):
    model, program = exported("roberta, blocks")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compare(torch._inductor.aoti_load_package(path), model)
