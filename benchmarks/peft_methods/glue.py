"""Every tuner of PEFT beside LReg on one task: at one budget, and some of them over budgets and numbers of steps.

    python -m benchmarks.peft_methods.glue --task sst2 --data_dir path/to/glue

It takes the options of run_glue.py, begins with those of configs/glue.yaml, and follows the same protocol. Without
--methods everything that there is is tried; what cannot be, or is too large for the budget, is listed with the reason.
Other ways to run it, with options after the above:

    --search_only                                            learning rates only; no test figure is read
    --methods lreg dora --seeds 0 1 2                        some methods, three seeds
    --methods lreg dora --budgets 4096 8192 --step_counts 200 800      two axes
    --methods lreg dora --eval_steps 20                       curves, time to a figure

Written to `--output_dir`: table, record and picture (study.md, study.json, study.png), and per budget and number of
steps a folder with the finished runs, where the same command, or one with more methods, seeds, budgets or steps, goes
on.
"""

import os

# Read when torch loads OpenMP: threads that spin while they wait make a small model many times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peft_methods.options import add_study_options
from examples.comparison.options import require_at_least, run_script
from examples.glue.run_glue import make_parser, parse_arguments

CONFIG = Path(__file__).resolve().parent / "configs" / "glue.yaml"


def study(argv: Sequence[str]) -> None:
    """Options, data, model, study."""
    began = time.perf_counter()
    args = parse_arguments([str(CONFIG), *argv], add_study_options(make_parser(), __doc__))
    require_at_least(args, lr_refine=0, lr_extend=0, eval_steps=1)
    # After the options: these imports take seconds.
    from benchmarks.peft_methods.study import run_study
    from examples.comparison.environment import start_processes
    from examples.glue.classification import ClassificationTask

    start_processes(args.num_threads, args.output_dir)
    run_study(ClassificationTask(args), args, began)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(study, argv)


if __name__ == "__main__":
    main()
