"""Adapt one image classifier with LReg: from `get_peft_model` to `save_pretrained`, with Accelerate.

    python examples/vision/finetune_vision.py

With no options nothing is downloaded: a small ResNet is trained on half of scikit-learn's digits first, for some
seconds; then it is adapted to the other half, turned by a right angle and inverted. Other ways to run it (the file goes
between the two columns):

    python            --model_name_or_path microsoft/resnet-50 --data_dir imagenette2    a model of the hub or a folder,
                                                                  images in train/CLASS/ and validation/CLASS/
    python            ... --target_modules resnet.encoder.stages.3    another place; the default is the paper's
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder; goes with --data_dir")
    parser.add_argument("--data_dir", help="folder with train/CLASS/ and validation/CLASS/")
    parser.add_argument("--image_size", type=int, help="height and width (default: what the model was made for)")
    parser.add_argument("--target_modules", nargs="+", help="default: the paper's placement for the model")
    parser.add_argument("--n_components", type=int, default=8)
    parser.add_argument("--n_nodes", type=int, default=8, help="nodes per component")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base_steps", type=int, default=200, help="of the offline ResNet")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step, over all processes")
    parser.add_argument("--learning_rate", type=float, default=3e-2)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", default="outputs/finetune_vision")
    parser.add_argument("--no_progress", action="store_true", help="show no bar")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel, default_data_collator, get_scheduler

from lreg_peft import LRegConfig, initialize_lreg_weights, inspect_targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of what the examples share
from arguments import DataArguments
from base_model import pretrain
from classification import model_config
from images import preparation
from sources import Data, class_names, labelled_images, offline_digits


def load(args: argparse.Namespace, show: bool) -> tuple[PreTrainedModel, Data, bool]:
    """Model, images, and whether the model needs a new classifier for them."""
    if (args.model_name_or_path is None) != (args.data_dir is None):
        raise SystemExit("error: --model_name_or_path and --data_dir go together, and one of them is missing.")
    options = DataArguments(offline_data="inverted", data_dir=args.data_dir, tuning_samples=1)
    if args.data_dir is None:
        return pretrain(options.offline_data, args.base_steps, show), offline_digits(options), False
    name = args.model_name_or_path
    config, is_new = model_config(name, class_names(options))
    model = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    return model, labelled_images(options, preparation(name, config, args.image_size)), is_new


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Share of the images of all processes that are given their class, in per cent."""
    model.eval()
    hits = [accelerator.gather_for_metrics(model(**batch).logits.argmax(dim=-1) == batch["labels"]) for batch in loader]
    return 100 * torch.cat(hits).float().mean().item()


def main(args: argparse.Namespace) -> None:
    # Batches are divided among the processes, so that their number does not change what a step sees.
    loading = DataLoaderConfiguration(split_batches=True)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=args.mixed_precision, dataloader_config=loading)
    show = accelerator.is_main_process and not args.no_progress
    set_seed(args.seed)
    model, data, has_new_head = load(args, show)
    if args.data_dir is None:  # the adapter's files name the model that they belong to
        model.name_or_path = str(Path(args.output_dir) / "base")
        if accelerator.is_main_process:
            model.save_pretrained(model.name_or_path)
    collate = default_data_collator
    train_loader = DataLoader(data.train, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    test_loader = DataLoader(data.test, args.batch_size, collate_fn=collate)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    model.to(accelerator.device)
    before = "" if has_new_head else f"{accuracy(model, test_loader, accelerator):.1f} before, "

    # The paper's placement unless others are named; a new classifier is trained in full.
    config = LRegConfig(
        preset="paper",
        target_modules=args.target_modules,
        n_components=args.n_components,
        n_nodes=args.n_nodes,
        init_weights="gradient",
        modules_to_save=["classifier"] if has_new_head else None,
    )
    sample = {"pixel_values": data.train[0]["pixel_values"].unsqueeze(0)}
    accelerator.print(inspect_targets(model, config, example_inputs=sample))
    model = get_peft_model(model, config)
    # Projections along the directions that lower the loss most, meshes at quantiles; the output does not change yet.
    initialize_lreg_weights(model, train_loader, show_progress=show)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, args.steps // 10, args.steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model.train()  # batch norms of the frozen model keep their statistics
    batches = chain.from_iterable(repeat(train_loader))  # pass after pass, shuffled anew
    for _ in tqdm(range(args.steps), desc="training", disable=not show):
        accelerator.backward(model(**next(batches)).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    after = accuracy(model, test_loader, accelerator)
    n_trained, folder = sum(parameter.numel() for parameter in trainable), Path(args.output_dir) / "adapter"
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.print(
        f"accuracy {before}{after:.1f} after, on {len(data.test):,} images; {n_trained:,} parameters in {folder}"
    )


if __name__ == "__main__":
    main(ARGUMENTS)
