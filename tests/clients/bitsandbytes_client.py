"""Bases in 4 and 8 bits by bitsandbytes, on the CPU."""

import bitsandbytes  # noqa: F401  (says at once that it is absent)
import torch
from common import run
from quantised import check, load
from transformers import BitsAndBytesConfig


def four_bits(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
    return load(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)


def eight_bits(folder):
    return load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")


if __name__ == "__main__":
    run(
        {
            "4-bit base": lambda: check(four_bits, ["q_proj", "mlp", "lm_head"]),
            "8-bit base": lambda: check(eight_bits, ["q_proj", "mlp", "lm_head"]),
        }
    )
