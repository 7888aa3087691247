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
from itertools import chain, repeat
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or folder; goes with --data_dir")
    parser.add_argument("--data_dir", help="folder with train/CLASS/ and validation/CLASS/")
    parser.add_argument("--image_size", type=int, default=224, help="height and width of the images in that folder")
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
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from peft import get_peft_model
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    default_data_collator,
    get_scheduler,
)

from lreg_peft import LRegConfig, initialize_lreg_weights, inspect_targets


class Folder(Dataset):
    """Images in a folder per class, the middle of each, with ImageNet's usual mean and deviation."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size, self.classes = size, sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((folder / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path, label = self.files[index]
        image = ImageOps.fit(Image.open(path).convert("RGB"), (self.size, self.size))
        values = (np.asarray(image, np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        return {"pixel_values": torch.tensor(values.transpose(2, 0, 1), dtype=torch.float32), "labels": label}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits of scikit-learn, [n, 1, 28, 28] in [0, 1], and their classes."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    large = torch.nn.functional.interpolate(images, size=20, mode="bilinear")
    return torch.nn.functional.pad(large, (4, 4, 4, 4)), torch.tensor(found.target)


def offline_model(steps: int, accelerator: Accelerator) -> PreTrainedModel:
    """A ResNet that has learned to read the first half of the digits."""
    names = {number: str(number) for number in range(10)}
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", id2label=names))
    images, labels = digits()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(labels) // 2, (64,)) * 2
        shifts = torch.randint(-3, 4, (2,)).tolist()
        pixels = images[chosen].roll(shifts, dims=(2, 3)) + 0.03 * torch.randn(64, 1, 28, 28)
        loss = model(pixel_values=normalised(pixels), labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 4) == 0:
            accelerator.print(f"base model: step {step}, loss {loss.item():.3f}")
    return model.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - 0.2) / 0.35


def offline_images():
    """The second half, turned by a right angle and inverted: 598 to train on, 300 to report on."""
    images, labels = digits()
    turned = normalised(1 - images[1::2].rot90(dims=(2, 3)))
    samples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(turned, labels[1::2], strict=True)]
    return [samples[300:], samples[:300]]


def given_model(name: str, classes: list[str]) -> tuple[PreTrainedModel, bool]:
    """A model for some classes, and whether its classifier is new because they are others than its own."""
    config = AutoConfig.from_pretrained(name)
    is_new = list(config.id2label.values()) != classes
    if is_new:
        config.id2label, config.label2id = dict(enumerate(classes)), {name: n for n, name in enumerate(classes)}
    options = {"config": config, "ignore_mismatched_sizes": True}
    return AutoModelForImageClassification.from_pretrained(name, **options), is_new


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
    set_seed(args.seed)
    if (args.model_name_or_path is None) != (args.data_dir is None):
        raise SystemExit("error: --model_name_or_path and --data_dir go together, and one of them is missing.")
    if args.data_dir is None:
        (train, test), model, has_new_head = offline_images(), offline_model(args.base_steps, accelerator), False
        model.name_or_path = str(Path(args.output_dir) / "base")  # the adapter's files name the model they belong to
        if accelerator.is_main_process:
            model.save_pretrained(model.name_or_path)
    else:
        train, test = (Folder(Path(args.data_dir) / part, args.image_size) for part in ("train", "validation"))
        model, has_new_head = given_model(args.model_name_or_path, train.classes)
    collate = default_data_collator
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    test_loader = DataLoader(test, args.batch_size, collate_fn=collate)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    model.to(accelerator.device)
    before = accuracy(model, test_loader, accelerator)

    # The paper's placement unless others are named; a new classifier is trained in full.
    config = LRegConfig(
        preset="paper",
        target_modules=args.target_modules,
        n_components=args.n_components,
        n_nodes=args.n_nodes,
        init_weights="gradient",
        modules_to_save=["classifier"] if has_new_head else None,
    )
    sample = {"pixel_values": train[0]["pixel_values"].unsqueeze(0)}
    accelerator.print(inspect_targets(model, config, example_inputs=sample))
    model = get_peft_model(model, config)
    # Projections along the directions that lower the loss most, meshes at quantiles; the output does not change yet.
    initialize_lreg_weights(model, train_loader, show_progress=False)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, args.steps // 10, args.steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model.train()  # batch norms of the frozen model keep their statistics
    batches = chain.from_iterable(repeat(train_loader))  # pass after pass, shuffled anew
    for step in range(1, args.steps + 1):
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if step == 1 or step % max(1, args.steps // 10) == 0:
            rate = schedule.get_last_lr()[0]
            accelerator.print(f"step {step}, loss {loss.item():.3f}, learning rate {rate:.2e}")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    after = accuracy(model, test_loader, accelerator)
    n_trained, folder = sum(parameter.numel() for parameter in trainable), Path(args.output_dir) / "adapter"
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.print(
        f"accuracy {before:.1f} -> {after:.1f} on {len(test):,} images; {n_trained:,} parameters in {folder}"
    )


if __name__ == "__main__":
    main(ARGUMENTS)
