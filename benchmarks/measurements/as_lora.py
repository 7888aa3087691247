"""What LReg's training is worth as a plain LoRA: a converted adapter beside LoRAs that were trained as such.

    python -m benchmarks.measurements.as_lora --output_dir OUT [--model MODEL --train_file TRAIN [--eval_file EVAL]]
    python -m benchmarks.measurements.as_lora --output_dir OUT --task pairs
    python -m benchmarks.measurements.as_lora --output_dir OUT --task sst2 --data_dir GLUE
        [--budget 32768] [--steps 50] [--seeds 0 1 2] [--learning_rate 0.02] [--lora_learning_rates 0.01 0.02]
        [--inside_only]

A model is adapted by LReg's recipe (`recommended_config`, start from gradients; calibration of a language model), and
by two LoRAs with a scale of one: of the very shape that the conversion has, same modules and same ranks, and of as many
parameters as LReg has, on the same modules with ranks in proportion to LReg's components; the new head of a classifier
starts as LReg's does. Same batches in the same order, AdamW without weight decay, linear schedule, gradients clipped at
1. Of several rates of a LoRA the one counts that is best with the first seed by the very figure that is reported, so
that the comparison errs in its favour. The conversion reads the first 16 batches of the training. What is evaluated as
LoRA is run by PEFT, from the tensors that `save_as_lora` writes.

The task "text" is causal language modelling. Without --model it is the small GPT-2 and the two texts that the WikiText
example makes of Python itself; without --eval_file the last tenth of the training text is held out. Every other task is
that of the GLUE example: "pairs" is its own, of Python's docstrings, the others come from the official files, and the
model is its MiniLM. --inside_only leaves out the output layer and the norm before it, for servers that refuse a LoRA
there; there is no calibration then. A second start in the same folder keeps what is finished.
"""

import argparse
import copy
import itertools
import json
import math
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from benchmarks.measurements.machine import command, device_name, versions
from lreg_peft import LRegLayer, convert_to_lora, initialize_lreg_weights, match_token_frequencies, recommended_config
from lreg_peft.training.head_start import start_head

ROWS = {
    "lreg": "LReg",
    "lora_no_bias": "as LoRA, no bias",
    "lora_bias": "as LoRA with biases",
    "constants_dropped": "the same, constants dropped",
    "lora_same_ranks": "LoRA of the same modules and ranks, trained as LoRA",
    "lora_same_count": "LoRA of as many parameters, trained as LoRA",
}
DEFAULTS: dict[
    bool, dict[str, Any]
] = {  # of sentences or not; the rates are near those that the examples' searches found
    False: {
        "budget": "32768",
        "steps": 50,
        "batch_size": 8,
        "learning_rate": 0.02,
        "lora_learning_rates": [0.01, 0.02],
    },
    True: {
        "budget": "64536",
        "steps": 100,
        "batch_size": 16,
        "learning_rate": 0.0055,
        "lora_learning_rates": [0.003, 0.0055],
    },
}


class Study(ABC):
    """A task, and the conditions that all runs share."""

    figure_name: str
    task_type: str

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    @abstractmethod
    def base(self) -> nn.Module:
        """A fresh copy, in eval mode; what is new in it follows torch's seed."""

    @abstractmethod
    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Training samples."""

    @abstractmethod
    def n_rows(self) -> int:
        """How many of them there are."""

    @abstractmethod
    def figure(self, model: nn.Module) -> float:
        """What is reported, on data that nothing was trained on."""

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """The training batches of a seed, from the first on."""
        generator, size = torch.Generator().manual_seed(seed), self.arguments.batch_size
        orders = (torch.randperm(self.n_rows(), generator=generator) for _ in itertools.count())
        rows = itertools.chain.from_iterable(order[: len(order) // size * size].view(-1, size) for order in orders)
        return (self.batch(row.tolist()) for row in itertools.islice(rows, steps))

    def fit(self, model: nn.Module, rate: float, seed: int, what: str) -> None:
        """Train what requires gradients. In eval mode: no method has dropout, and the base has none either."""
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

    def figure_as_lora(self, config: LoraConfig, state: dict[str, Tensor]) -> float:
        model = get_peft_model(self.base(), copy.deepcopy(config))
        set_peft_model_state_dict(model, state)
        return self.figure(model.eval())

    def start(self, seed: int) -> nn.Module:
        """LReg's adapter, before it sees data."""
        torch.manual_seed(seed)
        base, outside = self.base(), not self.arguments.inside_only
        options = {"output_head": outside, "final_norm": outside, "task_type": self.task_type}
        return get_peft_model(base, recommended_config(base, self.arguments.budget, **options)).eval()

    def lreg(self, seed: int) -> dict[str, Any]:
        """LReg, and what it is as a LoRA."""
        options, found = self.arguments, {}
        model, text = self.start(seed), self.task_type == "CAUSAL_LM" and not self.arguments.inside_only
        start = time.perf_counter()
        initialize_lreg_weights(model, list(self.batches(seed, 8)), start_head=text or None, show_progress=False)
        self.fit(model, options.learning_rate, seed, f"LReg, seed {seed}")
        if text:
            match_token_frequencies(model, list(self.batches(seed, 32)), show_progress=False)
        found["training_seconds"] = time.perf_counter() - start
        found["lreg"] = self.figure(model)
        start = time.perf_counter()
        data = list(self.batches(seed, 16))
        config, state, report = convert_to_lora(model, data, max_rise=1.0, show_progress=False)
        found["conversion_seconds"] = time.perf_counter() - start
        found["lora_no_bias"] = self.figure_as_lora(config, state)
        found["not_linear"] = report.not_linear
        with_bias, state, _ = convert_to_lora(model, data, bias="lora", max_rise=1.0, show_progress=False)
        found["lora_bias"] = self.figure_as_lora(with_bias, state)
        without = {name: value * 0 if name.endswith("lora_B.bias") else value for name, value in state.items()}
        found["constants_dropped"] = self.figure_as_lora(with_bias, without)
        return found

    def lora(self, row: str, seed: int, rates: list[float]) -> dict[float, float]:
        """A LoRA that is trained as such: its figures by learning rate."""
        model, tried = self.start(seed), {}
        config = same_count(model) if row == "lora_same_count" else self.same_ranks(model, seed)
        config.inference_mode = False
        for rate in rates:
            torch.manual_seed(seed)
            lora = get_peft_model(self.base(), copy.deepcopy(config)).eval()
            if self.task_type == "SEQ_CLS":  # what LReg's start does to the new head, for the LoRA too
                start_head(lora, list(self.batches(seed, 8)))
            self.fit(lora, rate, seed, f"{row} at {rate:g}, seed {seed}")
            tried[rate] = self.figure(lora)
        return tried

    def same_ranks(self, model: nn.Module, seed: int) -> LoraConfig:
        """What a conversion has does not depend on the training: every component is a rank."""
        return convert_to_lora(model, list(self.batches(seed, 1)), max_rise=100.0, show_progress=False)[0]

    def better(self, figures: dict[float, float]) -> float:
        """The rate with the best figure."""
        best = max if self.figure_name == "accuracy" else min
        return best(figures, key=lambda rate: figures[rate])


class Text(Study):
    """Causal language modelling on text in blocks."""

    figure_name, task_type = "perplexity", "CAUSAL_LM"

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
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

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.train[rows], "labels": self.train[rows]}

    def n_rows(self) -> int:
        return len(self.train)

    @torch.no_grad()
    def figure(self, model: nn.Module) -> float:
        """Perplexity of the evaluation text, all blocks of one length."""
        parts = self.evaluation.split(self.arguments.batch_size)
        loss = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in parts)
        return math.exp(loss / len(self.evaluation))


class Sentences(Study):
    """A task of the GLUE example."""

    figure_name, task_type = "accuracy", "SEQ_CLS"

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        from examples.comparison.environment import start_processes
        from examples.glue.classification import ClassificationTask
        from examples.glue.run_glue import parse_arguments

        options = ["--output_dir", str(arguments.output_dir), "--num_threads", str(arguments.threads)]
        if arguments.task != "pairs":
            options += ["--task", arguments.task, "--data_dir", str(arguments.data_dir)]
        parsed = parse_arguments(options)
        start_processes(parsed.num_threads, parsed.output_dir)
        self.task = ClassificationTask(parsed)

    def base(self) -> nn.Module:
        return self.task.load_base().eval()

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        return dict(self.task.collator(0)([self.task.train_data[row] for row in rows]))

    def n_rows(self) -> int:
        return len(self.task.train_data)

    def figure(self, model: nn.Module) -> float:
        """Accuracy on the validation samples, in per cent."""
        return 100 * self.task.evaluate(model, "test")["accuracy"]


def same_count(model: nn.Module) -> LoraConfig:
    """A LoRA on the linear layers of an LReg adapter, with ranks in proportion to the components there, dealt out until
    the count is nearest to LReg's."""
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LRegLayer) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    }
    components = {name: layer.lreg_encoder["default"].n_components for name, layer in layers.items()}
    widths = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    wanted = sum(weight.numel() for name, weight in model.named_parameters() if ".lreg_" in name)

    ranks, total = dict.fromkeys(components, 1), sum(widths.values())
    while nearer := [name for name in ranks if abs(total + widths[name] - wanted) < abs(total - wanted)]:
        name = min(nearer, key=lambda name: (ranks[name] + 1) / components[name])
        ranks[name] += 1
        total += widths[name]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    return LoraConfig(
        task_type=model.peft_config["default"].task_type,
        target_modules=list(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=model.peft_config["default"].modules_to_save,
    )


def offline_model(folder: Path) -> str:
    """The folder with the base model of run_wikitext.py, trained unless it is there."""
    from examples.comparison.environment import start_processes
    from examples.comparison.protocol import Protocol
    from examples.comparison.training import Progress
    from examples.wikitext.language_model import LanguageModelTask
    from examples.wikitext.run_wikitext import parse_arguments

    args = parse_arguments(["--output_dir", str(folder)])
    start_processes(args.num_threads, args.output_dir)
    protocol = Protocol(LanguageModelTask(args), args, folder)
    protocol.progress = Progress(args.base_steps, enabled=True)
    protocol.base()
    return str(folder / "base")


def texts(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """For training and for evaluation."""
    if arguments.train_file is None:
        from examples.wikitext.offline_text import load_offline_text

        offline = load_offline_text()
        return "\n".join(offline.train), "\n".join(offline.test)
    held_out = arguments.eval_file
    return arguments.train_file.read_text("utf-8"), None if held_out is None else held_out.read_text("utf-8")


def table(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """Figures by row and seed."""
    lines = [f"| {name} | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean ± std |"]
    lines.append("|---" * (len(runs) + 2) + "|")
    for key, words in ROWS.items():
        values = [run[key] for run in runs.values() if key in run]
        if len(values) == len(runs):
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            lines.append(
                f"| {words} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {statistics.mean(values):.1f}{spread} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", default="text", help='"text", "pairs", or a task of GLUE whose figure is accuracy')
    parser.add_argument("--model", help="of the task text: folder or name; offline without")
    parser.add_argument("--train_file", type=Path)
    parser.add_argument("--eval_file", type=Path)
    parser.add_argument("--data_dir", type=Path, help="GLUE's official files")
    parser.add_argument("--budget", help="parameters of the shortcuts, or as recommended_config has it")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--lora_learning_rates", type=float, nargs="*", help="none: no LoRA is trained")
    parser.add_argument("--inside_only", action="store_true", help="nothing at the output layer and the norm before it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.train_file is None):
        parser.error("--model and --train_file go together: a model of one's own needs a text of one's own")
    if (arguments.task in ("text", "pairs")) != (arguments.data_dir is None):
        parser.error("--data_dir belongs to a task of GLUE, and these need it")
    for name, value in DEFAULTS[arguments.task != "text"].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.budget.isdigit():
        arguments.budget = int(arguments.budget)
    return arguments


def main() -> None:
    """Run all seeds; see above."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    study: Study = Text(arguments) if arguments.task == "text" else Sentences(arguments)
    file = arguments.output_dir / "as_lora.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))["runs"] if file.exists() else {}

    def record() -> None:
        content = {
            "command": command(),
            "versions": versions("torch", "transformers", "peft", "lreg_peft"),
            "machine": device_name("cpu"),
            "threads": arguments.threads,
            "figure": study.figure_name,
            "parameters": counts,
            "runs": runs,
        }
        file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    first = study.start(arguments.seeds[0])
    counts = {"lreg": trained_in(first, "lreg_")}
    for row in ("lora_same_ranks", "lora_same_count") if arguments.lora_learning_rates else ():
        config = same_count(first) if row == "lora_same_count" else study.same_ranks(first, arguments.seeds[0])
        config.inference_mode = False
        counts[row] = trained_in(get_peft_model(study.base(), config), "lora_")
    rates: dict[str, list[float]] = {}
    for seed in map(str, arguments.seeds):
        run = runs.setdefault(seed, {})
        if "lreg" not in run:
            run.update(study.lreg(int(seed)))
            record()
        for row in list(counts)[1:]:
            if row not in run:
                tried = study.lora(row, int(seed), rates.get(row, arguments.lora_learning_rates))
                run[f"{row}_by_rate"] = {f"{rate:g}": figure for rate, figure in tried.items()}
                run[row] = tried[study.better(tried)]
                record()
            rates[row] = rates.get(row) or [study.better({float(k): v for k, v in run[f"{row}_by_rate"].items()})]
        print(
            table(study.figure_name, {seed: runs[seed] for seed in runs if seed in map(str, arguments.seeds)}),
            flush=True,
        )
    record()


def trained_in(model: nn.Module, part: str) -> int:
    """Parameters that are trained, of an adapter: a new head is left out."""
    return sum(w.numel() for name, w in model.named_parameters() if part in name and w.requires_grad)


if __name__ == "__main__":
    main()
