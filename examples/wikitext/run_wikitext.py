"""Adapt one language model to a new domain by several methods, under the same conditions, and compare them.

    accelerate launch examples/wikitext/run_wikitext.py

With no arguments nothing is downloaded: a small GPT-2 with a tokenizer of its own is trained on the docstrings of the
standard library (the base stage), then every method starts from that checkpoint and adapts it to the language
reference in `pydoc_data.topics`. Other ways to run it:

    run_wikitext.py --smoke                                                         everything, very small (CI)
    run_wikitext.py --methods lora lreg --seeds 42 43 44                            some methods, several seeds
    run_wikitext.py --budget 20000 --n_nodes 4                                          another parameter budget
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

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `comparison`

from arguments import Arguments, parse_arguments
from comparison.environment import make_folder, set_threads, start_processes
from comparison.protocol import run_comparison, run_script
from data import load_corpus
from language_model import LanguageModelTask


def compare(argv: Sequence[str]) -> None:
    """Options, text, model, comparison."""
    began = time.perf_counter()
    arguments = parse_arguments(argv)
    start_processes()
    run_comparison(prepare(arguments), arguments.comparison, arguments.run, began)


def prepare(arguments: Arguments) -> LanguageModelTask:
    """The task that the options name."""
    set_threads(arguments.run.num_threads)
    from_nothing = arguments.model.model_name_or_path is None
    corpus = load_corpus(arguments.data, needs_base_text=from_nothing, max_base_chars=arguments.scale.max_base_chars)
    output_dir = Path(arguments.run.output_dir)
    make_folder(output_dir)
    return LanguageModelTask(arguments, corpus, output_dir / "base")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
