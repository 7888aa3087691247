"""TRL's trainers with LReg adapters."""

import math
import tempfile

import pytest
from common import causal_lm, moved, run, shake, shortcut_state, sizes, texts, tokenizer
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lreg_peft import LRegConfig

TARGETS = ["q_proj", "mlp"]


def options(**more) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        **more,
    }


def config(**more) -> LRegConfig:
    return LRegConfig(**{"task_type": "CAUSAL_LM", "target_modules": TARGETS, **more})


def pairs() -> Dataset:
    rows = texts(8)
    return Dataset.from_dict(
        {"prompt": rows, "chosen": [" yes good"] * 8, "rejected": [" no bad"] * 8},
    )


def train(trainer) -> None:
    before = shortcut_state(trainer.model)
    trainer.train()
    assert moved(before, trainer.model), "some shortcuts did not move"


def sft() -> None:
    data = Dataset.from_dict({"text": texts()})
    arguments = SFTConfig(**options())
    train(SFTTrainer(causal_lm(), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config()))


def dpo() -> str:
    model = get_peft_model(causal_lm(), config())
    shake(model)  # an adapter that was trained before: the reference must be this policy
    trainer = DPOTrainer(model, args=DPOConfig(**options()), train_dataset=pairs(), processing_class=tokenizer())
    train(trainer)
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first - math.log(2)) < 1e-3, f"the first loss is {first}, not ln 2"
    return f"first loss {first:.4f} = ln 2"


def grpo() -> None:
    data = Dataset.from_dict({"prompt": texts(8)})
    more = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
    trainer = GRPOTrainer(
        causal_lm(),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=GRPOConfig(**options(**more)),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config(),
    )
    train(trainer)


def reward() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**sizes(), num_key_value_heads=2, num_labels=1))
    rows = texts(8)
    data = Dataset.from_dict({"chosen": [f"{row} good" for row in rows], "rejected": [f"{row} bad" for row in rows]})
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**options()),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config(task_type="SEQ_CLS"),
    )
    train(trainer)


def head_is_refused() -> str:
    with pytest.raises(ValueError, match="lm_head") as refusal:
        GRPOTrainer(
            causal_lm(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(**options(num_generations=4)),
            train_dataset=Dataset.from_dict({"prompt": texts(8)}),
            processing_class=tokenizer(),
            peft_config=LRegConfig(preset="paper", task_type="CAUSAL_LM"),
        )
    return str(refusal.value).split(":")[0]


if __name__ == "__main__":
    run(
        {
            "SFT": sft,
            "DPO, the reference is the trained policy": dpo,
            "GRPO": grpo,
            "Reward": reward,
            "GRPO refuses the default placement": head_is_refused,
        }
    )
