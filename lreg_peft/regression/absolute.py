"""The mean absolute error: penalties by reweighted least squares, the optimum by an interior-point method.

Minimises sum_i w_i |y_i - f(x_i)| + penalty(f) / 2. The penalties come first, by REML on squares weighted with
1 / max(|residual_i|, median): as if the errors were normal where they are small, with the tails of the absolute loss.

With the penalties given, the problem is convex, and every step of a primal-dual interior-point method (Portnoy &
Koenker 1997, for regression quantiles) is one more weighted least-squares fit, to other targets. The multipliers of a
fit, scaled to |u_i| <= w_i, bound the minimum from below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .additive import Additive, fit_additive, solve_terms
from .mesh1d import Array
from .models import SumModel, of_additive, of_smooth
from .report import Optimality
from .smooth import Grouped, Smooth, fit_on_nodes, fit_smooth

_CHOOSING = 5  # fits that choose penalties
_MAX_STEPS = 60
_TOLERANCE = 1e-6  # of the gap, relative to the objective
_CENTRING = 0.1
_SHORT = 0.995  # of the way to the border


@dataclass(frozen=True)
class _Step:
    """One reweighted fit: the function at the samples, its penalty, and what made them."""

    fit: Any
    fitted: Array  # [n]
    penalty: float
    penalties: Any


# From targets, weights of the squares, and penalties or None to choose them.
_Fit = Callable[[Array, Array, Any], _Step]


@dataclass(frozen=True)
class _Result:
    fit: Any
    objective: float
    lower_bound: float
    history: tuple[dict[str, float], ...]


def absolute_model(
    X: Array, y: Array, weight: Array, total: float, *, report: Callable[[], None], options: dict[str, Any]
) -> SumModel:
    """Fit.

    Args:
        X: `[n, d]`.
        y: `[n, q]`; outputs are fitted one by one.
        weight: `[n]`, positive.
        total: number of samples that the weights stand for.
        report: called after every fit.
        options: of `fit_smooth` for one feature, of `fit_additive` for several. Nodes and interactions are chosen for
            the squared loss.

    Returns:
        The fit.
    """
    single = X.shape[1] == 1
    if single:
        order = np.argsort(X[:, 0], kind="stable")
        X, y, weight = X[order], y[order], weight[order]
    options = dict(options)
    smoothing = options.pop("smoothing")
    results = []
    start: Any
    if single:
        start = fit_smooth(Grouped.of(X[:, 0], y, weight), total=total, smoothing="reml", **options)
        models = of_smooth(start)
    else:
        start = fit_additive(X, y, weight, total=total, smoothing="reml", **options)
        models = of_additive(start)
    for o in range(y.shape[1]):
        fit = (
            _smooth_step(start, X, total, smoothing, options["scale"])
            if single
            else _additive_step(start, X, total, smoothing)
        )
        first = start.predict(X[:, 0] if single else X)[:, o]
        results.append(_minimise(y[:, o], weight, first, fit, report))
    return _joined(models, [of_smooth(r.fit) if single else of_additive(r.fit) for r in results], results, X, y, weight)


def _smooth_step(start: Smooth, X: Array, total: float, smoothing: str | float, scale: Any) -> _Fit:
    def fit(y: Array, omega: Array, penalties: Any) -> _Step:
        data = Grouped.of(X[:, 0], y[:, None], omega)
        given = smoothing if isinstance(smoothing, str) else float(smoothing) * total
        found = fit_on_nodes(data, start.nodes, scale, given if penalties is None else float(penalties), total)
        fitted = found.predict(X[:, 0])[:, 0]
        squares = float(omega @ (y - fitted) ** 2)
        return _Step(found, fitted, max(float(found.objective[0]) - squares, 0.0), found.smoothing[0])

    return fit


def _additive_step(start: Additive, X: Array, total: float, smoothing: str | float) -> _Fit:
    def fit(y: Array, omega: Array, penalties: Any) -> _Step:
        found = solve_terms(start.terms, X, y[:, None], omega, total, smoothing, penalties=penalties)
        fitted = found.predict(X)[:, 0]
        squares = float(omega @ (y - fitted) ** 2)
        chosen = np.concatenate(found.smoothing)[:, 0] if found.smoothing else None
        return _Step(found, fitted, max(float(found.objective[0]) - squares, 0.0), chosen)

    return fit


def _minimise(y: Array, weight: Array, fitted: Array, fit: _Fit, report: Callable[[], None]) -> _Result:
    history = []
    step, penalties = None, None
    for _ in range(_CHOOSING):
        residual = np.abs(y - fitted)
        scale = _median(residual, weight) or float(residual.max()) or 1.0
        omega = weight / np.maximum(residual, scale)
        step = fit(y, omega, None)
        report()
        fitted, penalties = step.fitted, step.penalties
        history.append({"mean_absolute_error": float(weight @ np.abs(y - fitted) / weight.sum())})
    assert step is not None
    # Strictly inside of the constraints, with the dual equations fulfilled: multipliers and function scaled alike.
    u = omega * (y - fitted)
    share = 0.9 / max(float((np.abs(u) / weight).max()), 0.9)
    u, f = share * u, share * fitted
    positive = np.maximum(y - f, 0) + scale
    negative = positive - (y - f)
    best, lowest, bound = step, np.inf, 0.0
    for _ in range(_MAX_STEPS):
        above, below = weight - u, weight + u  # slacks of the multipliers
        mu = _CENTRING * float(positive @ above + negative @ below) / (2 * len(y))
        spread = positive / above + negative / below
        target = y + spread * u - mu / above + mu / below
        step = fit(target, 1 / spread, penalties)
        report()
        full = (target - step.fitted) / spread
        objective = float(weight @ np.abs(y - step.fitted)) + step.penalty / 2
        share = 1 / max(float((np.abs(full) / weight).max()), 1.0)
        bound = max(bound, share * float(full @ y) - share**2 * step.penalty / 2)
        if objective < lowest:
            best, lowest = step, objective
        history.append({"objective": objective, "lower_bound": bound})
        if lowest - bound <= _TOLERANCE * lowest:
            break
        change = full - u
        to_positive = (mu + positive * change) / above - positive
        to_negative = (mu - negative * change) / below - negative
        length = min(
            _room(positive, to_positive), _room(negative, to_negative), _room(above, -change), _room(below, change)
        )
        length = min(_SHORT * length, 1.0)
        if length < 1e-8:
            break
        u, f = u + length * change, f + length * (step.fitted - f)
        positive, negative = positive + length * to_positive, negative + length * to_negative
    return _Result(best.fit, lowest, min(bound, lowest), tuple(history))


def _median(values: Array, weight: Array) -> float:
    """Of a weighted sample."""
    order = np.argsort(values)
    reached = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(reached, 0.5 * reached[-1])]])


def _room(value: Array, change: Array) -> float:
    """How long a step keeps `value`, positive, from becoming negative."""
    falls = change < 0
    return float((value[falls] / -change[falls]).min()) if falls.any() else np.inf


def _joined(
    like: SumModel, models: list[SumModel], results: list[_Result], X: Array, y: Array, weight: Array
) -> SumModel:
    """One model of several outputs; all have the terms of `like`."""
    terms = tuple(
        replace(
            term,
            values=np.concatenate([model.terms[i].values for model in models], axis=-1),
            smoothing=np.concatenate([model.terms[i].smoothing for model in models], axis=-1),
            edf=np.concatenate([model.terms[i].edf for model in models]),
        )
        for i, term in enumerate(like.terms)
    )
    intercept = np.concatenate([model.intercept for model in models])
    edf = np.concatenate([model.edf for model in models])
    mean = intercept + sum((term.evaluate(X) for term in terms), start=np.zeros_like(y))
    squares = weight @ (y - mean) ** 2
    objective, bound = (sum(getattr(r, name) for r in results) for name in ("objective", "lower_bound"))
    about = "sum of absolute residuals plus half of the penalties, over the values at the nodes"
    return SumModel(
        terms,
        intercept,
        edf,
        squares / np.maximum(weight.sum() - edf, 1e-3 * weight.sum()),
        tuple(entry for result in results for entry in result.history),
        Optimality.of(objective, objective - bound, about),
        like.variance,
    )
