"""Bases quantised by quanto."""

from common import run
from optimum.quanto import freeze, qint8, quantize
from quantised import check, load


def base(folder):
    model = load(folder)
    quantize(model, weights=qint8)
    freeze(model)
    return model


if __name__ == "__main__":
    run({"int8 weights": lambda: check(base, ["q_proj", "mlp", "lm_head"])})
