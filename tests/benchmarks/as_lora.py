"""What LReg's training is worth as a plain LoRA: a converted adapter beside a LoRA that was trained as one.

    python tests/benchmarks/as_lora.py --output_dir OUT [--model MODEL --train_file TRAIN --eval_file EVAL]
        [--budget 32768] [--steps 50] [--seeds 0 1 2] [--learning_rate 0.02] [--lora_learning_rates 0.01 0.02]
        [--inside_only]

A causal language model is adapted by LReg's recipe (`recommended_config`, start from gradients, calibration) and by a
LoRA of the very shape that the conversion has: same modules, same ranks, scale one. Same blocks in the same order,
AdamW without weight decay, linear schedule, gradients clipped at 1. Of several rates of the LoRA the one counts that is
best on the evaluation text, so that the comparison errs in its favour. The conversion reads the blocks of the first 16
training steps. What is evaluated as LoRA is run by PEFT, from the tensors that `save_as_lora` writes.

"offline" stands for the small GPT-2 and the two texts that the WikiText example makes of Python itself. Without
--eval_file the last tenth of the training text is held out. --inside_only leaves out the output layer and the norm
before it, for servers that refuse a LoRA there; there is no calibration then.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import command, device_name, versions
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

from lreg_peft import calibrate_output, convert_to_lora, initialize_lreg_weights, recommended_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROWS = {
    "lreg": "LReg",
    "lora_no_bias": "as LoRA, no bias",
    "lora_bias": "as LoRA with biases",
    "constants_dropped": "the same, constants dropped",
    "lora_trained": "LoRA trained as LoRA",
}


class Study:
    """The texts in blocks, and the conditions that all runs share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = arguments.model or offline_model(arguments.output_dir)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        train, held_out = texts(arguments)
        self.train = self._blocks(tokenizer, train)
        if held_out is None:
            cut = len(self.train) * 9 // 10
            self.train, self.evaluation = self.train[:cut], self.train[cut:]
        else:
            self.evaluation = self._blocks(tokenizer, held_out)

    def _blocks(self, tokenizer: Any, text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        size = self.arguments.block_size
        return ids[: len(ids) // size * size].view(-1, size)

    def base(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, attn_implementation="sdpa").eval()

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """The training batches of a seed, from the first on."""
        generator, size = torch.Generator().manual_seed(seed), self.arguments.batch_size
        orders = (torch.randperm(len(self.train), generator=generator) for _ in itertools.count())
        rows = itertools.chain.from_iterable(order[: len(order) // size * size].view(-1, size) for order in orders)
        return ({"input_ids": self.train[row], "labels": self.train[row]} for row in itertools.islice(rows, steps))

    def fit(self, model: nn.Module, rate: float, seed: int, what: str) -> None:
        """Train what requires gradients. In eval mode: neither method has dropout, and the base has none either."""
        steps = self.arguments.steps
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        for batch in tqdm(self.batches(seed, steps), desc=what, total=steps, leave=False, mininterval=20):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy over the evaluation text, all blocks of one length."""
        parts = self.evaluation.split(self.arguments.batch_size)
        return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in parts) / len(self.evaluation)

    def loss_as_lora(self, config: LoraConfig, state: dict[str, Tensor]) -> float:
        model = get_peft_model(self.base(), config)
        set_peft_model_state_dict(model, state)
        return self.loss(model.eval())

    def once(self, seed: int) -> dict[str, Any]:
        """All rows of one seed."""
        options, found = self.arguments, {}
        torch.manual_seed(seed)
        base = self.base()
        outside = not options.inside_only
        config = recommended_config(
            base, options.budget, output_head=outside, final_norm=outside, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config).eval()
        start = time.perf_counter()
        initialize_lreg_weights(model, list(self.batches(seed, 8)), output_start=outside, show_progress=False)
        self.fit(model, options.learning_rate, seed, f"LReg, seed {seed}")
        if outside:
            calibrate_output(model, list(self.batches(seed, 32)), show_progress=False)
        found["training_seconds"] = time.perf_counter() - start
        found["lreg"] = self.loss(model)
        start = time.perf_counter()
        data = list(self.batches(seed, 16))
        config, state, report = convert_to_lora(model, data, max_rise=1.0, show_progress=False)
        found["conversion_seconds"] = time.perf_counter() - start
        found["lora_no_bias"] = self.loss_as_lora(config, state)
        found["not_linear"] = report.not_linear
        with_bias, state, _ = convert_to_lora(model, data, bias="lora", max_rise=1.0, show_progress=False)
        found["lora_bias"] = self.loss_as_lora(with_bias, state)
        without = {name: value * 0 if name.endswith("bias") else value for name, value in state.items()}
        found["constants_dropped"] = self.loss_as_lora(with_bias, without)
        config.inference_mode = False
        tried = {}
        for rate in options.lora_learning_rates:
            torch.manual_seed(seed)
            lora = get_peft_model(self.base(), config).eval()
            self.fit(lora, rate, seed, f"LoRA at {rate:g}, seed {seed}")
            tried[rate] = self.loss(lora)
        found["lora_trained"], found["lora_learning_rate"] = min((loss, rate) for rate, loss in tried.items())
        found["lora_losses"] = {f"{rate:g}": loss for rate, loss in tried.items()}
        found["parameters"] = {
            "lreg": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "lora": sum(weight.numel() for weight in lora.parameters() if weight.requires_grad),
        }
        return found


def offline_model(folder: Path) -> str:
    """The folder with the example's own base model, trained unless it is there."""
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "wikitext")]
    from offline_base import offline_base

    return offline_base(folder / "base", smoke=False, show_progress=True)


def texts(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """For training and for evaluation."""
    if arguments.train_file is None:
        sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "wikitext")]
        from offline_text import load_offline_text

        offline = load_offline_text()
        return "\n".join(offline.train), "\n".join(offline.test)
    held_out = arguments.eval_file
    return arguments.train_file.read_text("utf-8"), None if held_out is None else held_out.read_text("utf-8")


def table(runs: dict[int, dict[str, Any]]) -> str:
    """Perplexities by row and seed."""
    lines = ["| perplexity | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean |"]
    lines.append("|---" * (len(runs) + 2) + "|")
    for key, words in ROWS.items():
        values = [math.exp(run[key]) for run in runs.values()]
        lines.append(f"| {words} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {statistics.mean(values):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="folder or name; offline without")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--eval_file", type=Path)
    parser.add_argument(
        "--budget", default="32768", help="parameters of the shortcuts, or as recommended_config has it"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--lora_learning_rates", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--inside_only", action="store_true", help="nothing at the output layer and the norm before it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.train_file is None):
        parser.error("--model and --train_file go together: a model of one's own needs a text of one's own")
    if arguments.budget.isdigit():
        arguments.budget = int(arguments.budget)
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    study, runs = Study(arguments), {}
    for seed in arguments.seeds:
        runs[seed] = study.once(seed)
        record = {
            "command": command(),
            "versions": versions("torch", "transformers", "peft", "lreg_peft"),
            "machine": device_name("cpu"),
            "threads": arguments.threads,
            "perplexity": {words: [math.exp(run[key]) for run in runs.values()] for key, words in ROWS.items()},
            "runs": runs,
        }
        (arguments.output_dir / "as_lora.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(table(runs), flush=True)


if __name__ == "__main__":
    main()
