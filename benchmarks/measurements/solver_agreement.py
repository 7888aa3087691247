"""The convex solvers beside scikit-learn and NumPy, and the passes over the data that a certificate takes.

    python -m benchmarks.measurements.solver_agreement --output_dir OUT [--seeds 0 1] [--problems NAME ...]

Cross-entropy: objective against scikit-learn's LogisticRegression (no offset, no intercept, C = 1 / (ridge * samples),
run to a gradient of 1e-7), in its own terms mean cross-entropy + ridge/2 |c|^2. Least squares: residual sum of squares
against numpy.linalg.lstsq, without a ridge. "behind" is how far our objective lies above the other's, relative to it; a
negative value says that ours is lower. Passes count evaluations of the gradient and products with the Hessian, the
certificate's own pass included; bases are fp32, except where the condition number is the subject.

The cost of a pass is measured for the vocabularies of language models, in CPU milliseconds per 1000 samples, with the
product of a frozen head [classes, width] that gives the offset and without; memory is what the solver holds at once.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lreg_peft.core import (
    Chunk,
    Processes,
    Solution,
    hat_basis,
    quantile_nodes,
    solve_cross_entropy,
    solve_least_squares,
)
from lreg_peft.core.solve import cross_entropy as entropy_module
from lreg_peft.core.solve.problem import rows_at_once

RIDGE, TOLERANCE = 1e-4, 1e-6
ROWS = 1000


@dataclass(frozen=True)
class Problem:
    """Samples, made from a generator, and the dtype of the basis and the coefficients."""

    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    dtype: torch.dtype = torch.float32
    limit: int | None = None  # passes that are allowed


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _labels(draw: torch.Generator, logits: Tensor) -> Tensor:
    uniform = torch.rand(logits.shape, generator=draw, dtype=torch.float64)
    return (logits - (-uniform.log()).log()).argmax(1)


def _hats(draw: torch.Generator, n: int, components: int, n_nodes: int) -> Tensor:
    coords = torch.sigmoid(1.7 * _normal(draw, n, components))
    return hat_basis(coords, quantile_nodes(coords, n_nodes)).flatten(1)


def _turned(draw: torch.Generator, n: int, features: int, digits: int) -> tuple[Tensor, Tensor]:
    """A basis of condition number 10^digits in no special directions, and the directions."""
    turn = torch.linalg.qr(_normal(draw, features, features)).Q
    scales = torch.logspace(0, -digits, features, dtype=torch.float64)
    return _normal(draw, n, features) * scales @ turn, turn


def gaussian(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _normal(draw, 5000, 128)
    return basis, _labels(draw, 3 * basis @ _normal(draw, 128, 20) / 128**0.5)


def hats(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _hats(draw, 10_000, 16, 8)
    return basis, _labels(draw, basis @ _normal(draw, 128, 20) / 2)


def zipf(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _normal(draw, 3000, 16)
    return basis, _labels(draw, -torch.arange(1.0, 2001).log() + basis @ _normal(draw, 16, 2000) / 2)


def zipf_hats(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _hats(draw, 3000, 2, 8)
    return basis, _labels(draw, -torch.arange(1.0, 2001).log() + basis @ _normal(draw, 16, 2000) / 2)


def conditioned(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis, turn = _turned(draw, 3000, 40, 8)
    return basis, _labels(draw, 3 * basis @ turn.T @ _normal(draw, 40, 6))


def separable(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _normal(draw, 3000, 30)
    return basis, (basis @ _normal(draw, 30, 6)).argmax(1)


def regression(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _normal(draw, 5000, 60)
    return basis, basis @ _normal(draw, 60, 3) + _normal(draw, 5000, 3)


def conditioned_regression(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis, turn = _turned(draw, 5000, 60, 10)
    return basis, basis @ turn.T @ _normal(draw, 60, 3) * 1e3 + _normal(draw, 5000, 3)


def redundant_regression(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = _hats(draw, 5000, 8, 8)
    return basis, basis @ _normal(draw, 64, 3) + _normal(draw, 5000, 3)


ENTROPY = {
    "random: 20 classes, 128 Gaussian features": Problem(gaussian, limit=30),
    "random: 20 classes, 16 x 8 hat functions": Problem(hats),
    "long-tailed: 2000 Zipf classes, 16 Gaussian features": Problem(zipf, limit=45),
    "long-tailed: 2000 Zipf classes, 2 x 8 hat functions": Problem(zipf_hats, limit=45),
    "badly conditioned: 1e8": Problem(conditioned, torch.float64),
    "separable": Problem(separable),
}
SQUARES = {
    "least squares: random": Problem(regression, torch.float64),
    "least squares: condition 1e10": Problem(conditioned_regression, torch.float64),
    "least squares: redundant hat functions": Problem(redundant_regression, torch.float64),
}


def run(name: str, seed: int) -> dict[str, Any]:
    """Solve one problem both ways."""
    squares = name in SQUARES
    problem = (SQUARES if squares else ENTROPY)[name]
    basis, target = problem.make(torch.Generator().manual_seed(seed))
    basis = basis.to(problem.dtype)
    if not squares:
        # scikit-learn leaves classes without samples out of the model.
        _, target = target.unique(return_inverse=True)
    outputs = target.shape[1] if squares else int(target.max()) + 1

    def chunks() -> list[Chunk]:
        return [Chunk(b, t) for b, t in zip(basis.split(ROWS), target.split(ROWS), strict=True)]

    start = torch.zeros(basis.shape[1], outputs, dtype=problem.dtype)
    gaps: list[float] = []
    started = time.process_time()
    if squares:
        ours: Solution = solve_least_squares(chunks, start, tolerance=TOLERANCE)
    else:
        ours = solve_cross_entropy(
            chunks, start, ridge=RIDGE, tolerance=TOLERANCE, report=lambda passes, objective, gap: gaps.append(gap)
        )
    seconds = time.process_time() - started
    started = time.process_time()
    theirs = _lstsq(basis, target) if squares else _scikit_learn(basis, target)
    return {
        "problem": name,
        "seed": seed,
        "outputs": outputs,
        "objective": ours.objective,
        "reference": theirs,
        "behind": (ours.objective - theirs) / theirs,
        "gap": ours.gap,
        "passes": ours.passes,
        "limit": problem.limit,
        "method": ours.method,
        "status": ours.status,
        "seconds": seconds,
        "reference_seconds": time.process_time() - started,
        "gaps": gaps,
    }


def _lstsq(basis: Tensor, target: Tensor) -> float:
    solution = np.linalg.lstsq(basis.numpy(), target.numpy(), rcond=None)[0]
    return float((basis @ torch.tensor(solution) - target).square().sum() / (2 * len(basis)))


def _scikit_learn(basis: Tensor, target: Tensor) -> float:
    basis = basis.double()
    model = LogisticRegression(C=1 / (RIDGE * len(basis)), fit_intercept=False, tol=1e-7, max_iter=20_000)
    c = torch.tensor(model.fit(basis.numpy(), target.numpy()).coef_.T)
    loss = torch.nn.functional.cross_entropy(basis @ c, target)
    return float(loss + RIDGE / 2 * c.square().sum())


def table(runs: list[dict[str, Any]]) -> tuple[str, bool]:
    """Markdown with the worst of the seeds, and whether everything is within its bounds."""
    lines = [
        "| problem | largest difference | largest gap | passes | allowed | CPU seconds, ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    for name in dict.fromkeys(run["problem"] for run in runs):
        own = [run for run in runs if run["problem"] == name]
        behind = max((run["behind"] for run in own), key=abs)
        passes = [run["passes"] for run in own]
        gap, limit = max(run["gap"] for run in own), own[0]["limit"]
        spread = f"{min(passes)}-{max(passes)}" if min(passes) < max(passes) else f"{passes[0]}"
        times = [max(run[key] for run in own) for key in ("seconds", "reference_seconds")]
        # Ours may be lower: the solvers agree if ours is not behind by more than 1e-6.
        good &= abs(behind) <= 1e-6 and gap <= TOLERANCE and (limit is None or max(passes) <= limit)
        lines.append(
            f"| {name} | {behind:+.1e} | {gap:.1e} | {spread} | {limit or ''} | {times[0]:.2f} / {times[1]:.2f} |"
        )
    return "\n".join(lines), good


def pass_cost(classes: int, width: int, features: int) -> dict[str, Any]:
    """The best of three evaluations of the gradient in fp32."""
    rows = rows_at_once(classes, torch.device("cpu"))
    weight, hidden = torch.randn(classes, width) / width**0.5, torch.randn(2 * rows, width)
    basis, target = torch.rand(2 * rows, features), torch.randint(classes, (2 * rows,))

    def plain() -> Iterator[Chunk]:
        yield from map(Chunk, basis.split(rows), target.split(rows))

    def headed() -> Iterator[Chunk]:
        for chunk, h in zip(plain(), hidden.split(rows), strict=True):
            yield chunk._replace(offset=h @ weight.T)

    def cost(chunks: Callable[[], Iterator[Chunk]]) -> float:
        objective = entropy_module._Objective(chunks, (features, classes), "classes", RIDGE, Processes())
        c = torch.zeros(features, classes, dtype=torch.float64)
        objective.evaluate(c, torch.float32)
        times = []
        for _ in range(3):
            started = time.process_time()
            objective.evaluate(c, torch.float32)
            times.append(time.process_time() - started)
        return 1e6 * min(times) / (2 * rows)

    pairs = entropy_module._History(features * classes).pairs.maxlen
    return {
        "classes": classes,
        "width": width,
        "features": features,
        "solver": cost(plain),
        "with_head": cost(headed),
        "matrix_mib": rows * classes * 4 / 2**20,
        "history_mib": pairs * 2 * features * classes * 8 / 2**20,
    }


def cost_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| classes | features | ms per 1000 samples | with a head (width) | [samples, classes] matrix | L-BFGS pairs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['classes']:,} | {row['features']} | {row['solver']:.0f} | {row['with_head']:.0f} ({row['width']}) "
        f"| {row['matrix_mib']:.0f} MiB | {row['history_mib']:.0f} MiB |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Gap over passes, first seed."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    first = min(run["seed"] for run in runs)
    for run in runs:
        if run["seed"] == first and run["gaps"]:
            axes.semilogy(range(1, len(run["gaps"]) + 1), run["gaps"], label=run["problem"], linewidth=1.4)
    axes.axhline(TOLERANCE, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xlabel("passes over the data")
    axes.set_ylabel("certified gap")
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run, write table, JSON and picture; the exit status says whether all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--problems", nargs="+", default=[*ENTROPY, *SQUARES], choices=[*ENTROPY, *SQUARES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in arguments.problems:
        for seed in arguments.seeds:
            runs.append(run(name, seed))
            print(name, seed, f"{runs[-1]['behind']:+.1e}", runs[-1]["passes"], f"{runs[-1]['gap']:.1e}", flush=True)
    text, good = table(runs)
    costs = [pass_cost(*size, features) for size in ((8192, 256), (50_257, 768)) for features in (4, 16, 64)]
    text += "\n\n" + cost_table(costs)
    print(text)
    provenance = {
        "command": " ".join(Path(part).name if "/" in part else part for part in sys.argv),  # names, not places
        "settings": {"seeds": arguments.seeds, "ridge": RIDGE, "tolerance": TOLERANCE},
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "numpy")},
    }
    report = {"within_bounds": good, "runs": runs, "pass_costs": costs, "provenance": provenance}
    (arguments.output_dir / "solver_agreement.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output_dir / "solver_agreement.md").write_text(text + "\n", encoding="utf-8")
    draw(runs, arguments.output_dir / "solver_agreement.png")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
