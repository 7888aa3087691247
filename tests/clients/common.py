"""What the client scripts share: models of a few thousand weights, a tokenizer, texts, and how a check is reported."""

import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lreg_peft import LRegConfig

_TEXT = "the a cat dog bird sees likes eats fish seed and then it sleeps runs good bad yes no"
WORDS = _TEXT.split()
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = CHAT
    return made


def sizes(hidden: int = 32) -> dict:
    return {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def causal_lm(hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes(hidden), num_key_value_heads=2))


def saved_causal_lm(folder: Path, hidden: int = 32) -> Path:
    causal_lm(hidden).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def texts(count: int = 16) -> list[str]:
    return [" ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(6)) for i in range(count)]


def shake(model) -> None:
    """Weights as training leaves them, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lreg_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def shortcut_state(model) -> dict[str, torch.Tensor]:
    """The weights of the adapter that trains; a reference policy has another name."""
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if "lreg_" in name and ".default." in name
    }


def moved(before: dict, model) -> bool:
    """Whether every shortcut's coefficients changed."""
    after = shortcut_state(model)
    changed = [not torch.equal(value, after[name]) for name, value in before.items() if "coefficients" in name]
    return bool(changed) and all(changed)


def in_two_processes(worker: Callable[..., None], *args) -> None:
    """Call `worker(rank, *args)` in two processes that talk by gloo; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_connected, (f"file://{folder}/meeting", worker, args), nprocs=2)


def _connected(rank: int, meeting: str, worker: Callable[..., None], args: tuple) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        worker(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


def trained_alone(config, ids: torch.Tensor, steps: int) -> torch.nn.Module:
    """An adapted model after some steps of AdamW on one batch, in this process."""
    model = get_peft_model(causal_lm(), config)
    shake(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


#: What several processes train, and in how many steps.
STEPS = 4
WEIGHTINGS = {"full": {"n_nodes": 4}, "factored": {"weighting": "factored", "linear_term": True}}


def config(weighting: str) -> LRegConfig:
    """Shortcuts inside the layers, around blocks and on the output layer."""
    return LRegConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "mlp", "lm_head"], **WEIGHTINGS[weighting])


def batch() -> torch.Tensor:
    """Four texts as token ids."""
    return tokenizer()(texts(4), return_tensors="pt").input_ids


def same_as_alone(train: Callable[..., None], *options: Any) -> str:
    """Compare what two processes `train(rank, *options, folder)`, weighting last of the options, with one process."""
    folder = Path(tempfile.mkdtemp())
    in_two_processes(train, *options, folder)
    alone = trained_alone(config(options[-1]), batch(), STEPS)
    loaded = PeftModel.from_pretrained(causal_lm(), folder).eval()
    with torch.no_grad():
        difference = (loaded(batch()).logits - alone(batch()).logits).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference:.1e}"  # fp32, sums in another order, four steps of AdamW
    return f"logits differ by {difference:.0e}"


def run(checks: dict[str, Callable[[], str | None]]) -> None:
    """Run every check; one line `pass|fail <TAB> what <TAB> remark` each on stdout, and an exit status."""
    warnings.simplefilter("ignore")  # the clients' own
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    failed = 0
    for what, check in checks.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            outcome, remark = "pass", check() or ""
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            first = str(error).strip().splitlines()
            outcome, remark = "fail", f"{type(error).__name__}: {first[0][:100] if first else ''}"
            failed += 1
        print("\t".join(("@", outcome, what, remark, f"{time.perf_counter() - start:.1f}")), flush=True)
    sys.exit(1 if failed else 0)
