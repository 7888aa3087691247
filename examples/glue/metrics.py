"""The official figures of the GLUE tasks, from `evaluate` where its script can be loaded, else computed here.

Both ways compute the same: the script of `evaluate` calls scikit-learn for Matthews' correlation and F1, and SciPy for
the correlations of Pearson and Spearman.
"""

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from examples.comparison.environment import prefer_cache_if_unreachable
from examples.glue.tasks import Task

Figures = dict[str, float]
Metric = Callable[[np.ndarray, np.ndarray], Figures]


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0.0)),
    "matthews_correlation": lambda predictions, labels: float(matthews_corrcoef(labels, predictions)),
    "pearson": lambda predictions, labels: float(pearsonr(predictions, labels).statistic),
    "spearmanr": lambda predictions, labels: float(spearmanr(predictions, labels).statistic),
}


def computed_here(task: Task) -> Metric:
    """The task's figures from the formulas above."""
    return lambda predictions, labels: {name: FORMULAS[name](predictions, labels) for name in task.metrics}


def official_metric(task: Task) -> Metric | None:
    """`evaluate`'s own script for the task, or None where it cannot be loaded (no package, no hub, nothing cached)."""
    try:
        import evaluate  # here, because importing it takes seconds

        prefer_cache_if_unreachable()
        script = evaluate.load("glue", task.name, keep_in_memory=True)  # several processes, no shared file
    except Exception:  # a different type for each way a download can fail; the figures do not depend on it
        return None
    return lambda predictions, labels: dict(script.compute(predictions=predictions, references=labels))


def task_figures(metric: Metric, logits: np.ndarray, labels: np.ndarray, is_regression: bool) -> Figures:
    """The official figures of a model's outputs.

    A correlation that does not exist, because a model gives every sentence the same answer, counts as 0: such a model
    has found nothing out.

    Args:
        metric: from `official_metric` or `computed_here`.
        logits: [samples, classes], or [samples, 1] for a regression.
        labels: [samples].
        is_regression: whether the output is the prediction itself.
    """
    predictions = logits[:, 0] if is_regression else logits.argmax(axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy and scikit-learn warn of constant predictions
        figures = metric(predictions, labels)
    return {name: 0.0 if math.isnan(value) else float(value) for name, value in figures.items()}


def glue_score(figures: Mapping[str, float]) -> float:
    """GLUE's score of a task: the mean of its figures."""
    return sum(figures.values()) / len(figures)
