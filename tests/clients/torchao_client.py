"""Bases quantised by torchao."""

from common import run
from quantised import check, load
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def inside(folder):
    model = load(folder)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def whole(folder):
    model = load(folder)
    quantize_(model, Int8WeightOnlyConfig())
    return model


if __name__ == "__main__":
    run(
        {
            "int8 weights, shortcuts inside": lambda: check(inside, ["q_proj", "mlp"]),
            "int8 weights, a shortcut on a head that is int8 too": lambda: check(whole, ["mlp", "lm_head"]),
        }
    )
