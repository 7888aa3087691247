"""Sums of functions of one feature and of two, all smoothing parameters by restricted maximum likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg

from .design import Line, Moments, Pair, Term, chunks, moments
from .interactions import rank_pairs, significant
from .mesh1d import Array, Scale, place_nodes
from .variances import Ridge, fit_variances

# Nodes per function: what the features share, and the most and least a function gets at the start.
_SHARED = 400
_MOST, _LEAST = 32, 8
_CROWDED = 1 / 3  # a function that spends more of its nodes than this gets twice as many
_MAX_DOUBLINGS = 4
_GAIN = 10.0  # in the criterion, for which more nodes are kept: a Bayes factor of 150

_MAX_PAIRS = 10
_PAIR_NODES = (4, 10)


@dataclass(frozen=True)
class Additive:
    """A fitted model with `q` outputs.

    Attributes:
        terms: functions of one feature, then of two.
        values: per term, the nodal values `[functions, q]`, with mean zero over the samples.
        intercept: `[q]`.
        smoothing: per term `[groups, q]`; infinite for what has left.
        edf: per term `[q]`.
        noise_variance: `[q]`.
        objective: `[q]`.
        gap: `[q]`.
        criterion: `[q]`, twice the negative restricted log-likelihood, up to a constant common to models of the data.
        history: one entry per model tried.
    """

    terms: tuple[Term, ...]
    values: tuple[Array, ...]
    intercept: Array
    smoothing: tuple[Array, ...]
    edf: tuple[Array, ...]
    noise_variance: Array
    objective: Array
    gap: Array
    criterion: Array
    history: tuple[dict[str, float], ...]
    _sums: Moments | None = field(repr=False)
    _penalties: Array = field(repr=False)  # [p, q]

    def predict(self, X: Array) -> Array:
        """`[n, d] -> [n, q]`."""
        result = np.repeat(self.intercept[None], len(X), axis=0)
        if self.terms:
            table = np.concatenate(self.values)
            for part, design in chunks(self.terms, X):
                result[part] += design @ table
        return result

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function at `X`, without the noise; `[n, d] -> [n, q]`."""
        q = len(self.intercept)
        if self._sums is None:
            return np.zeros((len(X), q))
        result = np.repeat(self.noise_variance[None] / self._sums.weight, len(X), axis=0)
        if not self.terms:
            return result
        basis = linalg.block_diag(*[term.basis for term in self.terms])
        for o in range(q):
            here = np.flatnonzero(np.isfinite(self._penalties[:, o]))
            if not len(here):
                continue
            matrix = self._sums.gram[np.ix_(here, here)] + np.diag(self._penalties[here, o])
            factor = linalg.cholesky(matrix, lower=True)
            table = linalg.solve_triangular(factor, basis[:, here].T, lower=True)  # [present, functions]
            shift = linalg.solve_triangular(factor, self._sums.mean[here], lower=True)
            for part, design in chunks(self.terms, X):
                for rows in range(0, design.shape[0], 4096):
                    block = design[rows : rows + 4096]
                    deviation = block @ table.T - shift
                    where = slice(part.start + rows, part.start + rows + block.shape[0])
                    result[where, o] += self.noise_variance[o] * (deviation**2).sum(axis=1)
        return result


def fit_additive(
    X: Array,
    y: Array,
    weight: Array,
    *,
    total: float,
    n_nodes: int | None = None,
    interactions: int | str | Sequence[tuple[int, int]] = "auto",
    max_nodes: int = 4000,
    scale: Scale = "quantile",
    smoothing: str | float = "reml",
    random: np.random.Generator,
    report: Callable[[], None] | None = None,
) -> Additive:
    """Fit.

    Args:
        X: `[n, d]`.
        y: `[n, q]`.
        weight: `[n]`, positive.
        total: number of samples that the weights stand for.
        n_nodes: per function; None starts with up to 32 and doubles them where they are used.
        interactions: "auto", how many, or which; 0 for none.
        max_nodes: most hat functions of all terms together.
        scale: see `place_nodes`.
        smoothing: "reml", or one penalty for all groups, relative to the mean power of their columns times `total`.
        random: for the search of interactions in large data.
        report: called after every update of the penalties.

    Returns:
        The fit.
    """
    orders = {j: np.argsort(X[:, j], kind="stable") for j in range(X.shape[1])}
    varying = [j for j, order in orders.items() if X[order[0], j] < X[order[-1], j]]
    varying = varying[: max(max_nodes // 2, 1)]
    if len(varying) < sum(X[o[0], j] < X[o[-1], j] for j, o in orders.items()):
        raise ValueError(
            f"max_nodes={max_nodes} gives less than two nodes to each of the {X.shape[1]} features; raise max_nodes to "
            f"at least {2 * X.shape[1]}."
        )
    each = n_nodes or int(np.clip(_SHARED // max(len(varying), 1), _LEAST, _MOST))
    each = max(2, min(each, max_nodes // max(len(varying), 1)))
    wanted = dict.fromkeys(varying, each)
    cache: dict[tuple[int, int], Line] = {}

    def line(j: int, k: int) -> Line:
        if (j, k) not in cache:
            order = orders[j]
            nodes = place_nodes(X[order, j], weight[order], k, scale)
            if len(nodes) < 2:
                nodes = np.array([X[order[0], j], X[order[-1], j]])
            cache[j, k] = Line.over(j, X[:, j], weight, nodes)
        return cache[j, k]

    def solve(pairs: list[tuple[int, int]], before: Additive | None) -> Additive:
        terms: list[Term] = [line(j, wanted[j]) for j in varying]
        size = _pair_nodes(total, max_nodes, sum(t.n_functions for t in terms), len(pairs))
        terms += [Pair((line(i, size), line(j, size))) for i, j in pairs]
        return solve_terms(terms, X, y, weight, total, smoothing, before=before, report=report)

    pairs = _given(interactions, varying, X.shape[1])
    fit = solve(pairs, None)
    for _ in range(_MAX_DOUBLINGS if n_nodes is None else 0):
        crowded = [
            j
            for j, edf, term in zip(varying, fit.edf, fit.terms, strict=False)
            if edf.max(initial=0) > _CROWDED * term.n_functions and term.n_functions >= wanted[j]
        ]
        room = max_nodes - sum(term.n_functions for term in fit.terms)
        crowded = [j for j in crowded if (room := room - wanted[j]) >= 0]
        if not crowded:
            break
        wanted.update({j: 2 * wanted[j] for j in crowded})
        finer = solve(pairs, fit)
        better = finer.criterion.sum() < fit.criterion.sum() - _GAIN * y.shape[1] or not isinstance(smoothing, str)
        if not better:
            wanted.update({j: wanted[j] // 2 for j in crowded})
            break
        fit = finer
    most = _MAX_PAIRS if interactions == "auto" else interactions if isinstance(interactions, int) else 0
    if most and len(varying) > 1 and len(X) > 10:
        used = dict(zip(varying, (float(edf.max()) for edf in fit.edf), strict=False))
        candidates = sorted(varying, key=lambda j: (-used.get(j, 0.0), j))
        ranked = rank_pairs(X, y - fit.predict(X), weight, candidates, random)
        chosen = list(significant(ranked)) if interactions == "auto" else [pair for _, pair in ranked]
        if chosen := chosen[:most]:
            both = solve(chosen, fit)
            if interactions != "auto" or both.criterion.sum() < fit.criterion.sum():
                fit = both
    return fit


def _pair_nodes(total: float, max_nodes: int, used: int, n_pairs: int) -> int:
    """Nodes per side of the grids of interactions."""
    if not n_pairs:
        return 0
    size = int(np.clip(round(total ** (1 / 3)), *_PAIR_NODES))
    room = int(np.sqrt(max(max_nodes - used, 0) / n_pairs))
    if room < 2:
        raise ValueError(
            f"max_nodes={max_nodes} leaves no room for {n_pairs} interactions beside {used} nodes of single features; "
            "raise it."
        )
    return min(size, room)


def _given(interactions: int | str | Sequence[tuple[int, int]], varying: list[int], d: int) -> list[tuple[int, int]]:
    if isinstance(interactions, (int, str)):
        return []
    pairs = sorted({(min(pair), max(pair)) for pair in interactions})
    for i, j in pairs:
        if not 0 <= i < j < d:
            raise ValueError(f"interactions must be pairs of two different columns in [0, {d - 1}], got {(i, j)}.")
    return [(i, j) for i, j in pairs if i in varying and j in varying]


def solve_terms(
    terms: Sequence[Term],
    X: Array,
    y: Array,
    weight: Array,
    total: float,
    smoothing: str | float,
    *,
    penalties: Array | None = None,
    before: Additive | None = None,
    report: Callable[[], None] | None = None,
) -> Additive:
    """Fit given terms.

    Args:
        terms: functions of one feature, then of two.
        X: `[n, d]`.
        y: `[n, q]`.
        weight: `[n]`, positive.
        total: number of samples that the weights stand for.
        smoothing: see `fit_additive`.
        penalties: `[groups]`, used as they are instead of `smoothing`; None to choose them.
        before: a fit of the first of the terms, whose penalties are the start.
        report: called after every update of the penalties.

    Returns:
        The fit.
    """
    q = y.shape[1]
    if not terms:
        mean = weight @ y / weight.sum()
        squares = weight @ (y - mean) ** 2
        sums = Moments(np.zeros((0, 0)), np.zeros((0, q)), np.zeros(0), mean, squares, total)
        noise = squares / max(total - 1, 1.0)
        zero = np.zeros(q)
        return Additive((), (), mean, (), (), noise, squares, zero, np.full(q, np.nan), (), sums, np.zeros((0, q)))
    sums = moments(terms, X, y, weight)
    groups = [size for term in terms for size in term.groups]
    member = np.repeat(np.arange(len(groups)), groups)
    start = _starts(terms, before)
    fixed = penalties
    if fixed is None and not isinstance(smoothing, str):
        fixed = np.full(len(groups), float(smoothing) * total)
    fits: list[Ridge] = [
        fit_variances(
            sums.gram, sums.product[:, o], float(sums.squares[o]), groups, total,
            start=None if start is None else start[:, o], fixed=fixed, report=report,
        )
        for o in range(q)
    ]  # fmt: skip
    theta = np.stack([fit.theta for fit in fits], axis=1)
    chosen = np.stack([fit.penalties for fit in fits], axis=1)  # [groups, q]
    edf = np.stack([fit.edf for fit in fits], axis=1)
    values, smoothings, edfs = [], [], []
    intercept = sums.y_mean.copy()
    column = group = 0
    for term in terms:
        width, n_groups = sum(term.groups), len(term.groups)
        here = slice(column, column + width)
        # Functions come out with mean zero over the samples.
        shift = sums.mean[here] @ theta[here]
        values.append(term.basis @ theta[here] - shift)
        smoothings.append(chosen[group : group + n_groups])
        edfs.append(edf[group : group + n_groups].sum(axis=0))
        column, group = column + width, group + n_groups
    entry = {
        "nodes": float(sum(term.n_functions for term in terms)),
        "interactions": float(sum(isinstance(term, Pair) for term in terms)),
        "updates": float(sum(len(fit.history) - 1 for fit in fits)),
        "edf": float(1 + edf.sum(axis=0).mean()),
        "criterion": float(np.mean([fit.criterion for fit in fits])),
    }
    return Additive(
        tuple(terms),
        tuple(values),
        intercept,
        tuple(smoothings),
        tuple(edfs),
        np.array([fit.noise_variance for fit in fits]),
        np.array([fit.objective for fit in fits]),
        np.array([fit.gap for fit in fits]),
        np.array([fit.criterion for fit in fits]),
        (*(before.history if before else ()), entry),
        sums,
        chosen[member],
    )


def _starts(terms: Sequence[Term], before: Additive | None) -> Array | None:
    """Penalties to start from: those of the terms of `before`, which stand first."""
    if before is None:
        return None
    start = [
        penalty for term, penalty in zip(terms, before.smoothing, strict=False) if penalty.shape[0] == len(term.groups)
    ]
    if len(start) < len(before.terms):
        return None
    known = np.concatenate(start)
    missing = sum(len(term.groups) for term in terms) - len(known)
    return np.concatenate((known, np.full((missing, known.shape[1]), np.nan)))
