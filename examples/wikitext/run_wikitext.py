"""Adapt one language model to a new domain by several methods, under the same conditions, and compare them.

    accelerate launch examples/wikitext/run_wikitext.py

With no arguments nothing is downloaded: a small GPT-2 with a tokenizer of its own is trained on the docstrings of the
standard library (the base stage), then every method starts from that checkpoint and adapts it to the language
reference in `pydoc_data.topics`. Other ways to run it:

    run_wikitext.py --smoke                                                         everything, very small (CI)
    run_wikitext.py --methods lora lreg --seeds 42 43 44                            some methods, several seeds
    run_wikitext.py --budget 20000 --n_nodes 4                                      another parameter budget
    run_wikitext.py --train_file a.txt --test_file c.txt [--validation_file b.txt]  your text
    run_wikitext.py --model_name_or_path gpt2 [--preset paper]                      model and WikiText from the hub
    run_wikitext.py configs/paper-gpt2.yaml --seeds 1                               options from a file, and others
    run_wikitext.py --model_name_or_path path/to/model --base_steps 200             200 steps of full fine-tuning
                                                                                    before the methods start
    run_wikitext.py --architecture roberta --steps 2                                a masked model from nothing
    torchrun --nproc_per_node 2 run_wikitext.py                                     two CPU processes

The protocol, the same for every method: the same base checkpoint, data order, batch size, number of steps and
schedule; a learning rate chosen on a tuning split from a grid of the same size; the figure in the table is the
perplexity over the whole held-out test split, which nothing was chosen on. Dropout is switched off for all methods,
as the paper has it for LReg: the comparison is not about dropout.

Written to `--output_dir`: the table (results.json, results.md), a picture (results.png), the finished runs
(runs.jsonl, where a second start resumes), the base checkpoint (base/) and what each method trained (adapters/).
"""

import os

# Read when torch loads OpenMP. Its threads otherwise spin while they wait, and where other programs want the same cores
# that makes a small model many times slower (measured on two busy cores: 108 s against 12 s for a small run).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root: a script finds only its own folder

from examples.comparison.options import Parser, UserError, check, fill, require_at_least, run_script

CONFIGS = Path(__file__).resolve().parent / "configs"
#: Defaults of a full run and of a smoke run.
FULL = {"base_steps": 900, "steps": 120, "lr_trials": 3, "batch_size": 8, "block_size": 128}
SMOKE = {**FULL, "base_steps": 240, "steps": 20, "lr_trials": 2, "block_size": 64}


def make_parser() -> Parser:
    """The options beside the shared ones."""
    parser = Parser(__doc__, "wikitext")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", help="hub id or folder of a causal or masked language model (default: a small GPT-2)")
    add("--architecture", help="a model type of Transformers (gpt2, roberta, ...) at its default size, from nothing")
    add(
        "--preset",
        default="fair",
        help="'fair' searches every method's learning rate at one budget; 'paper' is the published protocol, for the "
        "models that have a file configs/paper-*.yaml",
    )
    add("--base_steps", type=int, help="steps of full training before the methods start (default 0 for a given model)")
    add("--base_learning_rate", type=float, help="of these (default 3e-3 from nothing, 5e-5 for a given model)")
    add("--mlm_probability", type=float, default=0.15, help="share of tokens that a masked model has to find")
    add = parser.add_argument_group("text, instead of the language reference that Python carries").add_argument
    add("--dataset_name", help="data set on the hub with the splits train, validation and, if possible, test")
    add("--dataset_config_name", help="configuration of that data set, such as wikitext-2-raw-v1")
    add("--text_column", default="text", help="its column of text")
    add("--train_file", help="UTF-8 text to adapt to")
    add("--validation_file", help="text to choose learning rates on (default: the last tenth of the training file)")
    add("--test_file", help="text to report on (default: the second half of the validation file)")
    add("--block_size", type=int, help="tokens in a sequence (default 128)")
    add("--max_train_chars", type=int, help="adapt to no more than the beginning of the training text")
    add("--max_eval_chars", type=int, help="evaluate on no more than the beginning of the other texts")
    return parser


def parse_arguments(argv: Sequence[str], parser: Parser | None = None) -> argparse.Namespace:
    """Read preset, config files and command line, fill in defaults, refuse what cannot be."""
    parser = parser or make_parser()
    args = parser.parse(argv)
    preset = preset_file(args.preset, args.model_name_or_path)
    if preset is not None:
        files_given = any((args.train_file, args.validation_file, args.test_file))
        args = parser.parse([str(preset), *argv])
        if files_given:  # a preset names its text too; files of one's own take its place
            args.dataset_name = args.dataset_config_name = None
    from_nothing = args.model_name_or_path is None
    if not from_nothing:
        fill(args, base_steps=0, base_learning_rate=5e-5)
    fill(args, base_learning_rate=3e-3, **(SMOKE if args.smoke else FULL))
    check(args)
    require_at_least(args, block_size=4, base_steps=int(from_nothing), max_train_chars=1, max_eval_chars=1)
    if not from_nothing and args.architecture is not None:
        raise UserError("Give either --architecture or --model_name_or_path, not both.")
    if not 0.0 < args.mlm_probability < 1.0:
        raise UserError(f"--mlm_probability must be between 0 and 1, got {args.mlm_probability}.")
    return args


def preset_file(preset: str, model_name: str | None) -> Path | None:
    """The options of a preset for a model; None where the defaults are the preset."""
    if preset not in ("fair", "paper"):
        raise UserError(f"There is no preset '{preset}'; choose fair or paper.")
    path = CONFIGS / f"{preset}-{Path(model_name or '').name}.yaml"
    if path.exists():
        return path
    if preset == "fair":
        return None
    known = ", ".join(sorted(path.stem.removeprefix("paper-") for path in CONFIGS.glob("paper-*.yaml")))
    raise UserError(f"The preset 'paper' needs --model_name_or_path with one of the paper's models ({known}).")


def compare(argv: Sequence[str]) -> None:
    """Options, text, model, comparison."""
    began = time.perf_counter()
    args = parse_arguments(argv)
    # After the options: these imports take seconds.
    from examples.comparison.environment import start_processes
    from examples.comparison.protocol import run_comparison
    from examples.wikitext.language_model import LanguageModelTask

    start_processes(args.num_threads, args.output_dir)
    run_comparison(LanguageModelTask(args), args, began)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
