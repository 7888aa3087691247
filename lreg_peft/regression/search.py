"""What a sum is made of: nodes for single features, and the pairs that cross-validation confirms.

For squares and for the cross-entropy alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .entropy import Entropy
from .interactions import rank_pairs
from .mesh1d import Array, Scale, place_nodes
from .samples import Samples
from .squares import Squares
from .sums import SumFit
from .terms import Line, Pair

# Nodes per function: what the features share, and the most and least a function gets at the start.
_SHARED = 400
_MOST, _LEAST = 32, 8
_ALONE = 256  # of a single feature
_CROWDED = 1 / 3  # a function that spends more of its nodes than this gets twice as many, up to
_FINEST = 512
_WORTH = 0.01  # share of the errors of cross-validation that must go with that
_MOST_GIVEN = 1024  # matrices of all nodes are dense

_PAIRS, _STRONG_PAIRS = 24, 8
_PAIR_NODES = (4, 16)  # least and most nodes of a side
# Energies that stand out, what the larger of two has by chance, and what is evidence in the sum of many; all in
# standard deviations.
_STRONG, _CHANCE, _EVIDENCE = 4.0, 0.85, 1.0
_TELLING = 1000  # samples, from which energies tell something

_CERTAIN = 0.5  # standard errors over the folds by which a larger model must be better
# Factors that all penalties together may get for smaller errors of cross-validation.
_FACTORS = 10.0 ** np.arange(0.5, 12.1, 0.5)
_MOST_EDF = 0.8  # of the observations

Loss = Squares | Entropy


def fit_sum(
    samples: Samples,
    loss_over: Callable[[Samples], Loss],
    *,
    n_nodes: int | None,
    interactions: int | str | Sequence[tuple[int, int]],
    max_nodes: int,
    scale: Scale,
    random: np.random.Generator,
) -> tuple[SumFit, tuple[dict[str, float], ...]]:
    """Choose terms and penalties on a part of large data, and fit them to all.

    Args:
        samples: the data.
        loss_over: what is minimised over samples.
        n_nodes: per function; None starts with up to 32, a single one with 256, and doubles them where they are used.
        interactions: "auto", how many, or which; 0 for none.
        max_nodes: most nodes of all terms together.
        scale: see `place_nodes`.
        random: for the search of interactions in large data.

    Returns:
        The fit, and one entry per model tried.
    """
    loss = loss_over(samples)
    part = samples.thinned(loss.choosing)
    if part is not samples:
        loss = loss_over(part)
    varying = [j for j in range(part.X.shape[1]) if part.X[:, j].min() < part.X[:, j].max()]
    rank = loss.line_rank(len(varying)) if n_nodes is None else None
    wanted = _mesh_sizes(varying, part.X.shape[1], n_nodes, max_nodes)
    build = Builder(part, scale)
    fit = loss.fit([build.line(j, wanted[j], rank) for j in varying])
    while n_nodes is None and (finer := _crowded(fit, wanted, max_nodes)):
        wanted.update({j: 2 * wanted[j] for j in finer})
        larger = loss.fit([build.line(j, wanted[j], rank) for j in varying], fit)
        if not larger.errors.sum() < (1 - _WORTH) * fit.errors.sum():
            break
        fit = larger
    if len(varying) > 1 and interactions != 0 and len(part.X) >= 10 and len(part.folds) > 1:
        fit = _PairSearch(fit, loss, build, max_nodes, random).run(interactions)
    if isinstance(loss.smoothing, str) and fit.terms and len(part.folds) > 1:
        fit = _rescaled(fit, loss)
    history = tuple(loss.history)
    if part is not samples:
        fit = loss_over(samples).fit(fit.terms, fit, fit.smoothing, folds=False)
    return fit, history


@dataclass
class Builder:
    """Makes terms, and keeps those that are used more than once."""

    samples: Samples
    scale: Scale
    lines: dict[tuple[int, int, int | None], Line] = field(default_factory=dict)
    sorted: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def line(self, j: int, k: int, rank: int | None = None) -> Line:
        """A function of feature `j` on at most `k` nodes; `rank`: most columns."""
        if (j, k, rank) not in self.lines:
            if j not in self.sorted:
                order = np.argsort(self.samples.X[:, j], kind="stable")
                self.sorted[j] = (self.samples.X[order, j], self.samples.mass[order])
            x, mass = self.sorted[j]
            nodes = place_nodes(x, mass, k, self.scale)
            if len(nodes) < 2:
                nodes = x[[0, -1]]
            self.lines[j, k, rank] = Line.over(j, x, mass, nodes, self.scale, rank)
        return self.lines[j, k, rank]


class _PairSearch:
    """Adds pairs to a fit of single features."""

    def __init__(self, fit: SumFit, loss: Loss, build: Builder, max_nodes: int, random: np.random.Generator):
        self.first, self.loss, self.build, self.max_nodes, self.random = fit, loss, build, max_nodes, random
        self.samples = loss.samples
        self.room = max_nodes - sum(term.size for term in fit.terms)
        self.values = {term.features[0]: len(np.unique(self.samples.X[:, term.features[0]])) for term in fit.terms}

    def run(self, interactions: int | str | Sequence[tuple[int, int]]) -> SumFit:
        """The fit with the pairs that were asked for, or that cross-validation confirms."""
        if interactions == "auto":
            return self._confirmed()
        if isinstance(interactions, (int, str)):
            asked = [pair for _, pair in self._ranked(self.first)[: int(interactions)]]
        else:
            given = sorted({(min(pair), max(pair)) for pair in interactions})
            asked = [pair for pair in given if pair[0] in self.values and pair[1] in self.values]
        if not asked:
            return self.first
        found = self._fitted(asked)
        if found is None:
            raise ValueError(
                f"max_nodes={self.max_nodes} leaves no room for {len(asked)} interactions beside "
                f"{self.max_nodes - self.room} nodes of single features; raise it."
            )
        return found

    def _confirmed(self) -> SumFit:
        """First the pairs that stand out; then many, if there is anything in all that are left."""
        best, ranked = self.first, self._ranked(self.first)
        telling = self.samples.total >= _TELLING
        strong = [pair for energy, pair in ranked if telling and energy > _STRONG][:_STRONG_PAIRS]
        larger = self._fitted(strong)
        if larger is not None and better(larger, best):
            best = larger
            ranked = [(energy, pair) for energy, pair in self._ranked(best) if pair not in strong]
        else:
            strong = []
        energy = np.array([energy for energy, _ in ranked])
        if telling and (energy - _CHANCE).sum() < _EVIDENCE * np.sqrt(len(energy)):
            return best
        larger = self._fitted([*strong, *(pair for _, pair in ranked[:_PAIRS])])
        return larger if larger is not None and better(larger, best) else best

    def _ranked(self, fit: SumFit) -> list[tuple[float, tuple[int, int]]]:
        used = _per_term(self.first).max(axis=1)
        features = [term.features[0] for term in self.first.terms]
        candidates = sorted(features, key=lambda j: (-used[features.index(j)], j))
        return rank_pairs(self.samples, self.loss.rest(fit), candidates, self.random)

    def _fitted(self, pairs: Sequence[tuple[int, int]]) -> SumFit | None:
        """With these pairs, on the largest grids that there is room for; None for no pairs or no room."""
        side = int(np.clip(round(2 * self.samples.total ** (1 / 3)), *_PAIR_NODES))
        while side >= 2 and sum(min(side, self.values[i]) * min(side, self.values[j]) for i, j in pairs) > self.room:
            side -= 1
        if side < 2 or not pairs:
            return None
        rank, line = self.loss.pair_rank, self.build.line
        terms = [Pair.of(line(i, side, rank), line(j, side, rank)) for i, j in pairs]
        return self.loss.fit([*self.first.terms, *terms], self.first)


def better(larger: SumFit, smaller: SumFit, certain: float = _CERTAIN) -> bool:
    """Whether errors of cross-validation `[folds, c]` are clearly smaller, relative to the sizes of the outputs."""
    scale = np.maximum(smaller.errors.sum(axis=0), np.finfo(float).tiny)
    gain = ((smaller.errors - larger.errors) / scale).sum(axis=1)
    return bool(len(gain) > 1 and gain.mean() > certain * gain.std(ddof=1) / np.sqrt(len(gain)))


def _rescaled(fit: SumFit, loss: Loss) -> SumFit:
    """Stronger penalties, all by one factor, where that makes smaller errors of cross-validation.

    And in any case such that some degrees of freedom are left for the noise.
    """
    best = fit
    for factor in _FACTORS:
        other = loss.fit(fit.terms, best, fit.smoothing * factor)
        crowded = 1 + best.edf.sum(axis=0).max() > _MOST_EDF * loss.samples.total
        if not crowded and not better(other, best, certain=0.0):
            break
        best = other
    return best


def _per_term(fit: SumFit) -> Array:
    """Effective degrees of freedom, `[terms, c]`."""
    starts = np.cumsum([0] + [len(term.groups) for term in fit.terms])[:-1]
    return np.add.reduceat(fit.edf, starts, axis=0) if len(starts) else fit.edf[:0]


def _mesh_sizes(varying: Sequence[int], n_features: int, n_nodes: int | None, max_nodes: int) -> dict[int, int]:
    """Nodes per feature at the start. Raises a `ValueError` where there are too few for all."""
    if len(varying) > max(max_nodes // 2, 1):
        raise ValueError(
            f"max_nodes={max_nodes} gives less than two nodes to each of the {n_features} features; raise max_nodes to "
            f"at least {2 * n_features}."
        )
    if n_nodes is not None and n_nodes > _MOST_GIVEN:
        raise ValueError(
            f"n_nodes must be at most {_MOST_GIVEN} per feature, got {n_nodes}; for more take LagrangeEncoder with a "
            "linear model."
        )
    start = _ALONE if len(varying) == 1 else int(np.clip(_SHARED // max(len(varying), 1), _LEAST, _MOST))
    return dict.fromkeys(varying, max(2, min(n_nodes or start, max_nodes // max(len(varying), 1))))


def _crowded(fit: SumFit, wanted: dict[int, int], max_nodes: int) -> list[int]:
    """Features whose functions use most of their nodes, as far as there is room to double them."""
    result, room = [], max_nodes - sum(term.size for term in fit.terms)
    for j, used, term in zip(wanted, _per_term(fit), fit.terms, strict=True):
        if used.max(initial=0) > _CROWDED * term.size and wanted[j] <= term.size < _FINEST:
            room -= wanted[j]
            if room >= 0:
                result.append(j)
    return result
