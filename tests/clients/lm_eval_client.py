"""EleutherAI's evaluation harness: log-likelihoods of an adapter it loads itself."""

import tempfile
from pathlib import Path

import torch
from common import load, run, saved_causal_lm, shake, texts, tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model

from lreg_peft import LRegConfig


def log_likelihoods() -> str:
    folder = Path(tempfile.mkdtemp())
    base = saved_causal_lm(folder / "base")
    model = get_peft_model(load(base), LRegConfig(target_modules=["mlp", "lm_head"])).eval()
    shake(model)
    model.save_pretrained(folder / "adapter")
    harness = HFLM(pretrained=str(base), peft=str(folder / "adapter"), device="cpu", batch_size=2, dtype="float32")
    assert isinstance(harness.model, PeftModel)
    rows = [(text, " good fish") for text in texts(4)]
    requests = [Instance("loglikelihood", {}, row, i) for i, row in enumerate(rows)]
    found = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    encode = tokenizer()
    for (context, continuation), value in zip(rows, found, strict=True):
        ids = encode(context + continuation, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        expected = logs.gather(1, ids[0, 1:, None])[-2:].sum().item()
        assert abs(value - expected) < 1e-4, f"{value} in place of {expected}"
    return "equal to 1e-4"


if __name__ == "__main__":
    run({"log-likelihoods of base + adapter": log_likelihoods})
