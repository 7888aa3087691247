"""Adapted models as ONNX files in onnxruntime, and a converted LoRA merged and exported.

pip install onnx onnxscript onnxruntime
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from common import SPECIAL, WORDS, causal_lm, run, shake, sizes
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from lreg_peft import LRegConfig, recommended_config, save_as_lora

WEIGHTINGS = {
    "full": {"weighting": "full"},
    "reduced": {"weighting": "reduced"},
    "factored": {"weighting": "factored"},
    "factored, linear term": {"weighting": "factored", "linear_term": True},
}


def example(length: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**sizes()))


def check(model: torch.nn.Module) -> str:
    """Export once, run at other lengths and batch sizes."""
    model = model.eval()
    model.config.use_cache = False
    inputs = example(9)
    shapes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=60)} for name in inputs}
    far = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (), file, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for length, batch in ((5, 2), (17, 3)):
            given = example(length, batch)
            names = {entry.name for entry in session.get_inputs()}
            found = session.run(None, {name: value.numpy() for name, value in given.items() if name in names})[0]
            with torch.no_grad():
                expected = model(**given).logits
            far = max(far, float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
    assert far < 1e-5, far
    return f"relative difference {far:.0e}"


def language_model(**options) -> torch.nn.Module:
    model = get_peft_model(causal_lm(), LRegConfig(target_modules=["q_proj", "down_proj", "lm_head"], **options))
    shake(model)
    return model.get_base_model()


def classifier(**options) -> torch.nn.Module:
    model = get_peft_model(bert(), LRegConfig(target_modules=["query", "dense"], **options))
    shake(model)
    return model.get_base_model()


def merged() -> torch.nn.Module:
    base = causal_lm()
    model = get_peft_model(base, recommended_config(base, 2500, task_type="CAUSAL_LM"))
    shake(model)
    data = [{**example(12), "labels": example(12)["input_ids"]}]
    with tempfile.TemporaryDirectory() as folder:
        save_as_lora(folder, model.eval(), data, show_progress=False)
        return PeftModel.from_pretrained(causal_lm(), folder).merge_and_unload()


if __name__ == "__main__":
    run(
        {
            f"causal language model, weighting {name}": lambda options=options: check(language_model(**options))
            for name, options in WEIGHTINGS.items()
        }
        | {
            f"classifier, weighting {name}": lambda options=options: check(classifier(**options))
            for name, options in WEIGHTINGS.items()
        }
        | {"the recipe as a LoRA, merged": lambda: check(merged())}
    )
