"""What a second grade gains, and linearised refinement of a fitted regressor: test R^2, half a minute.

python -m benchmarks.regression.grades
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import get_peft_model
from sklearn.metrics import r2_score

from benchmarks.regression.benchmark_sets import Array, Split, draw, real_sets, synthetic, uniform
from lreg_peft import LRegConfig, refine_linearized
from lreg_peft.regression import LagrangeRegressor, MultigradeRegressor

#: Not sums of functions of one feature and of pairs; noise .1.
CURVED = {
    "exp(x1 + sin 3 x2 + x3^2 - x4)": lambda x: (
        np.exp(x[:, 0] + np.sin(3 * x[:, 1]) + x[:, 2] ** 2 - x[:, 3]), 0.1,
    ),
    "sin(4 x1 + 4 x2 + 4 x3 + 2 x4) + sum of x": lambda x: (np.sin(x @ [4, 4, 4, 2, 0]) + x.sum(axis=1), 0.1),
    "3 x1 x2 x3 + x4": lambda x: (3 * x[:, :3].prod(axis=1) + x[:, 3], 0.1),
}  # fmt: skip
USUAL = ("A1", "B1", "Fig4A", "A2", "Friedman-1")


def splits(seed: int) -> Iterator[tuple[str, Split]]:
    """All sets of a seed."""
    for name, target in CURVED.items():
        yield name, draw(uniform(-1, 1, 5), target, 2000, 4000, seed)
    for name in USUAL:
        yield name, synthetic(name).split(seed)
    for data in real_sets():
        if data.name == "diabetes":
            yield f"{data.name}, a fold", data.split(seed)


def refined(split: Split, n_nodes: int) -> tuple[float, float, float, str]:
    """Test R^2 of a regressor, after refinement of its network, and with moving nodes; what the refinement says."""
    start = LagrangeRegressor(n_nodes=n_nodes, smoothing=1e-8).fit(split.x, split.y)
    torch.manual_seed(0)  # of the adapter's directions
    model = get_peft_model(start.to_torch(), LRegConfig(target_modules=["0", "2"], n_components=1, n_nodes=4))
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)[:, None]
    parts = [{"input": x[i::5], "labels": y[i::5]} for i in range(5)]
    result = refine_linearized(model, parts[:4], eval_data=parts[4:], n_rounds=5, show_progress=False)
    with torch.no_grad():
        found: Array = model(torch.from_numpy(split.x_test))[:, 0].numpy()
    free = LagrangeRegressor(n_nodes=n_nodes, nodes="free").fit(split.x, split.y)
    return (
        start.score(split.x_test, split.y_test),
        r2_score(split.y_test, found),
        free.score(split.x_test, split.y_test),
        result.status,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the samples")
    parser.add_argument("--n_nodes", type=int, default=24, help="nodes of the regressor that is refined")
    options = parser.parse_args(arguments)
    seeds, n_nodes = options.seeds, options.n_nodes
    print("| target | seed | first grade | second grade | CPU seconds |\n|---|---:|---:|---:|---:|")
    for seed in seeds:
        for name, split in splits(seed):
            start = time.process_time()
            model = MultigradeRegressor().fit(split.x, split.y)
            seconds = time.process_time() - start
            first, second = (r2_score(split.y_test, stage) for stage in model.staged_predict(split.x_test))
            print(f"| {name} | {seed} | {first:.4f} | {second:.4f} | {seconds:.2f} |", flush=True)
    print(f"\n| set, {n_nodes} nodes | at quantiles | network refined | nodes='free' | |\n|---|---:|---:|---:|---|")
    for name in ("A1", "B1"):
        before, after, free, status = refined(synthetic(name).split(seeds[0]), n_nodes)
        print(f"| {name} | {before:.4f} | {after:.4f} | {free:.4f} | {status} |")


if __name__ == "__main__":
    main()
