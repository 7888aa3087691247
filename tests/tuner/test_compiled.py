"""Adapted models as graphs: compiled without a break and once, exported with a dynamic batch and length."""

import itertools

import pytest
import tiny
import torch
from peft import get_peft_model
from tiers import slow
from torch import nn

from lreg_peft import recommended_config


def gpt2():
    """Without its loss named, Transformers logs a warning from the forward pass, which is a graph break by itself."""
    model = tiny.gpt2(n_layer=1)  # every layer is traced
    model.loss_type = "ForCausalLM"
    return model


MODELS = {
    "gpt2": (gpt2, {"target_modules": ["mlp", "c_attn", "ln_f", "lm_head"]}),
    "bert": (
        lambda: tiny.build("bert", "MASKED_LM", num_hidden_layers=1),
        {"target_modules": ["query", "key", "intermediate.dense", "cls"]},
    ),
}
# Compilers get single operations and eager mode fused ones: roundings of u over the length of an element.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(name, **options):
    build, places = MODELS[name]
    model = tiny.adapt(build(), **{**places, "n_nodes": 5, **options})
    tiny.shake(model)
    return model


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def models_and_heads(*first: tuple[str, str]) -> list:
    """All pairs; but for the first ones they are slow."""
    return [*first, *slow(*(pair for pair in itertools.product(MODELS, tiny.WEIGHTINGS) if pair not in first))]


class TestCompiled:
    @pytest.mark.parametrize(("name", "weighting"), models_and_heads(("gpt2", "factored+linear")))
    def test_training(self, name, weighting):
        """One graph, compiled in the first step, with the losses of eager mode while the weights change."""
        losses = []
        for is_compiled in (False, True):
            model = adapted(name, **tiny.WEIGHTINGS[weighting]).train()
            call = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
            values = []
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    loss = call(**batch(step)).loss
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                values.append(loss.detach())
            losses.append(torch.stack(values))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
        assert losses[0].unique().numel() == 3

    @pytest.mark.parametrize(("name", "weighting"), models_and_heads(("gpt2", "reduced"), ("bert", "full")))
    def test_inference_also_after_a_move_of_the_mesh(self, name, weighting):
        model = adapted(name, **tiny.WEIGHTINGS[weighting]).eval()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    found = compiled(**batch(step)).logits
                torch.testing.assert_close(found, model(**batch(step)).logits, **TOLERANCE)
                for layer in tiny.layers(model):
                    nodes = layer.lreg_encoder["default"].nodes
                    nodes.copy_(nodes**1.1)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("places", ["recommended", *slow("mlp", "attn")])
def test_exported_with_a_dynamic_batch_and_length(places):
    """Of every length, also that of the hidden size."""
    base = tiny.gpt2()
    if places == "recommended":  # norm and output layer included
        config = recommended_config(tiny.gpt2(), init_weights=True)
        assert {"ln_f", "lm_head"} <= {name.rpartition(".")[2] for name in config.target_modules}
        model = get_peft_model(base, config).eval()
    else:
        model = tiny.adapt(base, target_modules=[places], n_nodes=5).eval()
    tiny.shake(model)
    model.double()  # in fp32 two orders of summation differ by 2e-4 on some processors
    length, samples = torch.export.Dim("length", min=2, max=32), torch.export.Dim("batch", min=2, max=64)
    example = torch.randint(3, tiny.VOCABULARY, (3, 9))
    program = torch.export.export(Logits(model), (example,), dynamic_shapes={"input_ids": {0: samples, 1: length}})
    for shape in ((2, 5), (4, tiny.HIDDEN), (tiny.HIDDEN, 7), (3, 30)):
        ids = torch.randint(3, tiny.VOCABULARY, shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(ids), Logits(model)(ids), **TOLERANCE)
