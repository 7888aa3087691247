"""Adapt one language model to a text with LReg: from `get_peft_model` to `save_pretrained`, with Accelerate.

    python examples/wikitext/finetune_wikitext.py

With no options nothing is downloaded: the model is a small GPT-2 that first reads Python's docstrings (a minute), the
text is Python's language reference. Other ways to run it (the file goes between the two columns):

    python            --model_name_or_path gpt2                   GPT-2 and WikiText-2 from the hub
    python            --train_file a.txt --test_file b.txt        local UTF-8 text; a model may be a folder, too
    python            --model_name_or_path Qwen/Qwen3-0.6B --budget lora:8     another architecture, as many parameters
                                                                  as LoRA of rank 8 has there
    accelerate launch --mixed_precision bf16 ...                  mixed precision (or the option --mixed_precision)
    accelerate launch --multi_gpu --num_processes 4 ...           several GPUs; or after `accelerate config`, no flags
    torchrun          --nproc_per_node 2 ...                      two processes, on a CPU as well
    python            --smoke --steps 20                          everything very small, to see that it runs
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait leave the cores to others

import argparse
import math
import sys
from itertools import chain, repeat
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder of a causal model (default: the offline model)")
    parser.add_argument("--train_file", help="UTF-8 text to adapt to; goes with --test_file")
    parser.add_argument("--test_file", help="UTF-8 text for the perplexity")
    parser.add_argument("--budget", help="parameters: a number, or as in lora:8 (default: a component per module)")
    parser.add_argument("--n_nodes", type=int, default=8, help="nodes per component")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8, help="blocks in a step, over all processes")
    parser.add_argument("--block_size", type=int, default=128, help="tokens")
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="outputs/finetune_wikitext")
    parser.add_argument("--no_progress", action="store_true", help="show no bar")
    parser.add_argument("--smoke", action="store_true", help="a very small offline model")
    args = parser.parse_args()
    args.budget = int(args.budget) if (args.budget or "").isdigit() else args.budget
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_linear_schedule_with_warmup

from lreg_peft import initialize_lreg_weights, match_token_frequencies, recommended_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of what the examples share
from offline_base import offline_base
from offline_text import load_offline_text


def read_text(args: argparse.Namespace, separator: str) -> tuple[str, str]:
    """Text to train on and text to report on: local files, WikiText-2 from the hub, or Python's language reference."""
    if (args.train_file is None) != (args.test_file is None):
        raise SystemExit("error: --train_file and --test_file go together, and one of them is missing.")
    if args.train_file:
        return Path(args.train_file).read_text(encoding="utf-8"), Path(args.test_file).read_text(encoding="utf-8")
    if args.model_name_or_path:
        wikitext = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return "".join(wikitext["train"]["text"]), "".join(wikitext["test"]["text"])
    offline = load_offline_text(max_base_chars=1)  # the base text is the base model's affair
    return separator.join(offline.train), separator.join(offline.test)


def make_blocks(tokenizer: AutoTokenizer, text: str, block_size: int):
    """A list of whole blocks of tokens; a language model's labels are its inputs."""
    lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(list(chain.from_iterable(lines)))
    return [{"input_ids": block, "labels": block} for block in tokens.split(block_size) if len(block) == block_size]


@torch.no_grad()
def perplexity(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """exp of the mean loss over all blocks of all processes."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss  # over blocks of equal length, so that the mean of means is the mean
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    return math.exp(torch.cat(losses).double().mean().item())


def main(args: argparse.Namespace) -> None:
    # Batches are divided among the processes, so that their number does not change what a step sees.
    loading = DataLoaderConfiguration(split_batches=True)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=args.mixed_precision, dataloader_config=loading)
    show = accelerator.is_main_process and not args.no_progress
    set_seed(args.seed)
    name, output_dir = args.model_name_or_path, Path(args.output_dir)
    with accelerator.main_process_first():
        name = name or offline_base(output_dir / ("base-smoke" if args.smoke else "base"), args.smoke, show)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).to(accelerator.device)

    block_size = min(args.block_size, model.config.max_position_embeddings)
    train, test = (make_blocks(tokenizer, text, block_size) for text in read_text(args, tokenizer.eos_token))
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)
    test_loader = DataLoader(test, args.batch_size, collate_fn=default_data_collator)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    before = perplexity(model, test_loader, accelerator)

    # Factored shortcuts with a linear term on all linear layers, the last norm and the head, most on the attention.
    # As in the paper, the frozen model trains without its dropout.
    config = recommended_config(model, args.budget, task_type="CAUSAL_LM", n_nodes=args.n_nodes, backbone_eval=True)
    model = get_peft_model(model, config)
    # Projections along the directions that lower the loss most, meshes at quantiles, and at the head the shift in how
    # often each token comes.
    initialize_lreg_weights(model, train_loader, start_head=True, show_progress=show)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model.train()  # the frozen model stays in eval mode
    batches = chain.from_iterable(repeat(train_loader))  # pass after pass, shuffled anew
    for _ in tqdm(range(args.steps), desc="training", disable=not show):
        accelerator.backward(model(**next(batches)).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    # What so few steps have not learned of how often each token comes has a closed form.
    match_token_frequencies(model, train_loader, show_progress=show)
    after = perplexity(model, test_loader, accelerator)
    n_trained, folder = sum(parameter.numel() for parameter in trainable), output_dir / "adapter"
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.print(f"perplexity {before:.2f} -> {after:.2f}; {n_trained:,} parameters in {folder}")


if __name__ == "__main__":
    main(ARGUMENTS)
