"""Every tuner of PEFT beside LReg on one text: at one budget, and some of them over budgets and numbers of steps.

    run_study.py configs/study.yaml --model_name_or_path path/to/model --train_file a.txt --test_file b.txt

It takes the options of run_wikitext.py and follows the same protocol. Without --methods everything that the comparison
knows is tried; what cannot be, or is too large for the budget, is listed with the reason. Other ways to run it:

    run_study.py configs/study.yaml ... --search_only                    learning rates only; no test figure is read
    run_study.py configs/study.yaml ... --methods lreg dora --seeds 0 1 2                 some methods, three seeds
    run_study.py configs/study.yaml ... --methods lreg dora --budgets 4096 8192 --step_counts 200 800      two axes
    run_study.py configs/study.yaml ... --methods lreg dora --eval_steps 5                   curves, time to a figure

Written to `--output_dir`: table, record and picture (study.md, study.json, study.png), and per budget and number of
steps a folder with the finished runs, where the same command, or one with more methods, seeds, budgets or steps, goes
on.
"""

import os

# Read when torch loads OpenMP: threads that spin while they wait make a small model many times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `comparison`

from arguments import parse_arguments
from comparison.protocol import run_script
from comparison.study import study_of
from run_wikitext import prepare


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(study_of(parse_arguments, prepare), argv)


if __name__ == "__main__":
    main()
