"""Whether certified fits of an adapter profit from a dynamic program for the nodes, beside exchanges alone.

`fit_meshes` from a start at the quantiles, with strategy "exchange" and "program": training objective at the start and
at the end, and mean squared error (cross-entropy for digits) on samples that took no part. One component of one input
for the functions of one variable, principal axes for the others. From the repository root, some two minutes:

    python tests/benchmarks/mesh_program.py
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import nn

from lreg_peft import LRegConfig, fit_meshes, initialize_lreg_weights

#: name -> components, inputs and targets of n samples.
ONE = {
    "B1": lambda r, n: (x := 1 / r.uniform(1, 50, n), np.sin(1 / x) + 0.01 * r.standard_normal(n)),
    "A1": lambda r, n: (x := r.uniform(-np.pi, np.pi, n), np.sin(x) + np.cos(x) ** 2 / 5 * r.standard_normal(n)),
}


def friedman(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    x = random.uniform(0, 1, (n, 10))
    mean = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, mean + random.standard_normal(n)


def sets(seed: int) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor, int]]:
    """Name, components, inputs, targets, and how many of the samples are for training."""
    random = np.random.default_rng(seed)
    for name, make in ONE.items():
        (x, y), (x_test, y_test) = make(random, 1000), make(random, 10_000)
        both = torch.from_numpy(np.concatenate((x, x_test)))[:, None], torch.from_numpy(np.concatenate((y, y_test)))
        yield name, 1, both[0], both[1][:, None], 1000
    x, y = friedman(random, 13_000)
    yield "Friedman-1", 8, torch.from_numpy(x), torch.from_numpy(y)[:, None], 3000
    x, labels = load_digits(return_X_y=True)
    order = random.permutation(len(x))
    yield "digits", 4, torch.from_numpy(x[order] / 16), torch.from_numpy(labels[order]), 1347


class Zero(nn.Module):
    """Whatever there is to learn is the shortcut's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, outputs).double()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(x)


def measure(components: int, x: torch.Tensor, y: torch.Tensor, n: int, dof: int, strategy: str) -> list[float]:
    """Objective at the start and at the end, loss on other samples, CPU seconds."""
    torch.manual_seed(0)
    outputs = y.shape[1] if y.is_floating_point() else int(y.max()) + 1
    config = LRegConfig(target_modules=["head"], n_components=components, dof=dof, init_weights="pca")
    model = get_peft_model(Zero(x.shape[1], outputs), config)
    data = [{"x": x[:n], "labels": y[:n]}]
    initialize_lreg_weights(model, data, show_progress=False)
    start = time.process_time()
    fit = fit_meshes(model, data, ridge=1e-7 if components == 1 else 1e-4, strategy=strategy, show_progress=False)
    seconds = time.process_time() - start
    with torch.no_grad():
        found = model(x[n:])
    loss = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    return [fit.objectives[0], fit.objectives[-1], loss(found, y[n:]).item(), seconds]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the samples; figures are means")
    parser.add_argument("--dofs", type=int, nargs="+", default=[8, 16], help="nodes per component")
    options = parser.parse_args()
    print("| | nodes | quantiles | exchange | program | test: exchange | program | seconds | |\n" + "|---" * 9 + "|")
    for dof in options.dofs:
        rows: dict[str, list[list[float]]] = {}
        for seed in options.seeds:
            for name, *problem in sets(seed):
                (first, *exchange), (_, *program) = (
                    measure(*problem, dof, strategy) for strategy in ("exchange", "program")
                )
                both = [value for pair in zip(exchange, program, strict=True) for value in pair]
                rows.setdefault(name, []).append([first, *both])
        for name, values in rows.items():
            cells = [f"{value:.4g}" for value in np.mean(values, axis=0)]
            print(f"| {name} | {dof} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
