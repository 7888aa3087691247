"""Adapt one language model to a text with LReg: from `get_peft_model` to `save_pretrained`, with Accelerate.

    python examples/wikitext/finetune_wikitext.py

With no options nothing is downloaded: the model is a small GPT-2 that first reads Python's docstrings (some minutes,
once), the text is Python's language reference. Other ways to run it (the file goes between the two columns):

    python            --model_name_or_path gpt2                   GPT-2 and WikiText-2 from the hub
    python            --train_file a.txt --test_file b.txt        local UTF-8 text; a model may be a folder, too
    python            --model_name_or_path Qwen/Qwen3-0.6B --budget lora:8     another architecture, as many parameters
                                                                  as LoRA of rank 8 has there
    accelerate launch --mixed_precision bf16 ...                  mixed precision (or the option --mixed_precision)
    accelerate launch --multi_gpu --num_processes 4 ...           several GPUs; or after `accelerate config`, no flags
    torchrun          --nproc_per_node 2 ...                      two processes, on a CPU as well
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait leave the cores to others

import argparse
import ast
import math
import re
import sysconfig
from itertools import chain, repeat
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder of a causal model (default: the offline model)")
    parser.add_argument("--train_file", help="UTF-8 text to adapt to; goes with --test_file")
    parser.add_argument("--test_file", help="UTF-8 text for the perplexity")
    parser.add_argument("--prompt", default="The", help="beginning of the text that is written before and after")
    parser.add_argument("--budget", help="parameters: a number, or as in lora:8 (default: a component per module)")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8, help="blocks in a step, over all processes")
    parser.add_argument("--block_size", type=int, default=128, help="tokens")
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="outputs/finetune_wikitext")
    parser.add_argument("--base_steps", type=int, default=900, help="of the offline model")
    args = parser.parse_args()
    args.budget = int(args.budget) if (args.budget or "").isdigit() else args.budget
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from peft import get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from lreg_peft import initialize_lreg_weights, match_token_frequencies, recommended_config

# --- what there is without a download -------------------------------------------------------------------------------


def offline_texts() -> tuple[str, str, str]:
    """Docstrings of Python's library for the base model; its language reference, seven topics of eight to train on."""
    from pydoc_data.topics import topics

    seen: set[str] = set()  # topics quote each other: every paragraph stays where it comes first

    def new_paragraphs(text: str) -> str:
        found = [p for p in re.split(r"\n\s*\n", text) if len(p) < 40 or " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in found)
        return "\n\n".join(found) + "\n\n"

    documents = [new_paragraphs(topics[name]) for name in sorted(topics)]
    docstrings = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-s]*.py")):  # without turtle's demonstrations
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstrings.append(new_paragraphs(ast.get_docstring(node) or ""))
    test = documents[::8]
    return "".join(docstrings), "".join(d for d in documents if d not in test), "".join(test)


def offline_base(folder: Path, text: str, steps: int, accelerator: Accelerator) -> None:
    """A small GPT-2 that has read a text, kept in a folder."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    end = tokenizer.eos_token_id
    sizes = {"n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.06}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=end, eos_token_id=end))
    loader = DataLoader(make_blocks(tokenizer, text, 128), 8, shuffle=True, drop_last=True)
    fit(model.to(accelerator.device), loader, steps, 3e-3, accelerator, "base model")
    if accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    accelerator.wait_for_everyone()


# --- the same for any model and text ----------------------------------------------------------------------------------


def read_texts(args: argparse.Namespace) -> tuple[str, str]:
    """Text to train on and text to report on: local files, WikiText-2 from the hub, or Python's language reference."""
    if (args.train_file is None) != (args.test_file is None):
        raise SystemExit("error: --train_file and --test_file go together, and one of them is missing.")
    if args.train_file:
        return Path(args.train_file).read_text(encoding="utf-8"), Path(args.test_file).read_text(encoding="utf-8")
    if args.model_name_or_path:
        from datasets import load_dataset

        wikitext = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return "".join(wikitext["train"]["text"]), "".join(wikitext["test"]["text"])
    return offline_texts()[1:]


def make_blocks(tokenizer, text, block_size):
    """Whole blocks of tokens; a language model's labels are its inputs."""
    lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(list(chain.from_iterable(lines)))
    return [{"input_ids": block, "labels": block} for block in tokens.split(block_size) if len(block) == block_size]


def fit(model, loader, steps: int, learning_rate: float, accelerator: Accelerator, what: str) -> None:
    """Train what requires gradients, and say how it goes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model.train()
    batches = chain.from_iterable(repeat(loader))  # pass after pass, shuffled anew
    for step in range(1, steps + 1):
        batch = {name: values.to(accelerator.device) for name, values in next(batches).items()}
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if step == 1 or step % max(1, steps // 12) == 0:
            rate = schedule.get_last_lr()[0]
            accelerator.print(f"{what}: step {step}, loss {loss.item():.3f}, learning rate {rate:.2e}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """exp of the mean loss over all blocks of all processes."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss  # over blocks of equal length, so that the mean of means is the mean
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    return math.exp(torch.cat(losses).double().mean().item())


def written(model, tokenizer: AutoTokenizer, prompt: str) -> str:
    """What a model writes after a prompt; the same draws each time."""
    set_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    options = {
        "max_length": min(len(ids[0]) + 40, model.config.max_position_embeddings),
        "do_sample": True,
        "top_k": 20,
    }
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id, **options
    )
    return repr(tokenizer.decode(tokens[0]))


def main(args: argparse.Namespace) -> None:
    # Batches are divided among the processes, so that their number does not change what a step sees.
    loading = DataLoaderConfiguration(split_batches=True)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=args.mixed_precision, dataloader_config=loading)
    set_seed(args.seed)
    train_text, test_text = read_texts(args)
    output_dir = Path(args.output_dir)
    name = args.model_name_or_path or str(output_dir / "base")
    if not args.model_name_or_path and not (output_dir / "base" / "model.safetensors").is_file():
        offline_base(output_dir / "base", offline_texts()[0], args.base_steps, accelerator)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).to(accelerator.device)

    block_size = min(args.block_size, model.config.max_position_embeddings)
    train, test = (make_blocks(tokenizer, text, block_size) for text in (train_text, test_text))
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)
    test_loader = DataLoader(test, args.batch_size, collate_fn=default_data_collator)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    before, text_before = perplexity(model, test_loader, accelerator), written(model, tokenizer, args.prompt)

    # Factored shortcuts with a linear term on all linear layers, the last norm and the head, most on the attention.
    # As in the paper, the frozen model trains without its dropout.
    config = recommended_config(model, args.budget, task_type="CAUSAL_LM", backbone_eval=True)
    model = get_peft_model(model, config)
    # Projections along the directions that lower the loss most, meshes at quantiles, and at the head the shift in how
    # often each token comes.
    initialize_lreg_weights(model, train_loader, start_head=True, show_progress=False)
    fit(model, train_loader, args.steps, args.learning_rate, accelerator, "adapter")
    # What so few steps have not learned of how often each token comes has a closed form.
    match_token_frequencies(model, train_loader, show_progress=False)

    after, text_after = perplexity(model, test_loader, accelerator), written(model, tokenizer, args.prompt)
    n_trained, folder = sum(p.numel() for p in model.parameters() if p.requires_grad), output_dir / "adapter"
    model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.print(f"before: {text_before}\nafter:  {text_after}")
    accelerator.print(f"perplexity {before:.2f} -> {after:.2f}; {n_trained:,} parameters in {folder}")


if __name__ == "__main__":
    main(ARGUMENTS)
