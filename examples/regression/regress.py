"""Regression without a network: a curve with an error band, then five features, beside what one would take instead.

    pip install -e ".[examples,regression]"
    python examples/regression/regress.py

Prints test R^2 and seconds; draws the curve, its band and the nodes that it is made of into `--output`. All data
are made here. The comparison with more methods and real sets is `benchmarks/regression`.
"""

import argparse
import time
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/regression.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split

from lreg_peft.regression import LagrangeRegressor


def compare(title: str, x: np.ndarray, y: np.ndarray) -> LagrangeRegressor:
    """Fit three methods with their defaults on three quarters of the samples; returns ours."""
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0)
    print(f"{title}: {len(x_train):,} samples, {x.shape[1]} features")
    methods = (LagrangeRegressor(), HistGradientBoostingRegressor(random_state=0), LinearRegression())
    for method in methods:
        began = time.perf_counter()
        score = method.fit(x_train, y_train).score(x_test, y_test)
        print(f"  {type(method).__name__:30} R^2 {score:.4f} in {time.perf_counter() - began:.2f} s")
    return methods[0]


def draw(regressor: LagrangeRegressor, x: np.ndarray, y: np.ndarray, path: Path) -> None:
    """Samples, curve, band of two standard deviations, nodes."""
    grid = np.linspace(x.min(), x.max(), 1000)[:, None]
    mean, std = regressor.predict(grid, return_std=True)
    (term,) = regressor.terms_
    nodes = np.asarray(term.nodes[0]).ravel()
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.scatter(x, y, s=4, color="0.7", label="samples")
    axes.fill_between(grid[:, 0], mean - 2 * std, mean + 2 * std, alpha=0.3, label="mean ± 2 standard deviations")
    axes.plot(grid, mean, label="LagrangeRegressor")
    axes.plot(nodes, np.full(len(nodes), y.min()), "|", color="black", label=f"{len(nodes)} nodes")
    axes.set(title="sin(1 / (x + 0.1)) with noise: the fit, its error band and its nodes", xlabel="x")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> None:
    random = np.random.default_rng(args.seed)
    x = random.uniform(0, 1, (1000, 1))
    y = np.sin(1 / (x[:, 0] + 0.1)) + 0.1 * random.normal(size=1000)
    regressor = compare("sin(1 / (x + 0.1)), noise 0.1", x, y)
    draw(regressor, x, y, args.output)
    compare("Friedman's first function, noise 1", *make_friedman1(2000, noise=1.0, random_state=args.seed))
    print(f"The picture is {args.output}.")


if __name__ == "__main__":
    main(ARGUMENTS)
