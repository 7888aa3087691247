"""What a sum is made of: nodes for single features, and the pairs that cross-validation confirms.

For squares and for the cross-entropy alike: a fit has `terms`, `edf`, `variances` and `errors`, and tells its `rest`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .interactions import rank_pairs
from .mesh1d import Array, Scale, place_nodes
from .samples import Samples
from .terms import Line, Pair, Term

# Nodes per function: what the features share, and the most and least a function gets at the start.
_SHARED = 400
_MOST, _LEAST = 32, 8
_ALONE = 256  # of a single feature
_CROWDED = 1 / 3  # a function that spends more of its nodes than this gets twice as many, up to
_FINEST = 512

# Variances of one kind are related: each is estimated as if it had so many more coefficients with the kind's mean.
# Those of single features are not, so that features without use vanish; those of interactions are nearly common to all
# pairs, for what single pairs seem to gain in few samples is mostly chance. A few of the pairs, those that explain
# most, get finer products and variances of their own where cross-validation confirms it.
POOLS = (0.0, 0.0, 50.0, 50.0, 50.0, 3.0, 3.0, 3.0)
_PAIRS, _FINE_PAIRS = 40, 8
_FINE_SAMPLES = 500
# Energies that stand out, what the larger of two has by chance, and what is evidence in the sum of many; all in
# standard deviations.
_TELLING = 1000  # samples
_STRONG, _CHANCE, _EVIDENCE = 4.0, 0.85, 1.0
_PAIR_NODES, _FINE_NODES = (4, 8), 24
_RANK, _FINE_RANK = 5, 12
CERTAIN = 0.5  # standard errors over the folds by which a larger model must be better


@dataclass
class Builder:
    """Makes terms, and keeps those that are used more than once."""

    samples: Samples
    scale: Scale
    rank: int = _RANK
    lines: dict[tuple[int, int, int | None], Line] = field(default_factory=dict)
    sorted: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def line(self, j: int, k: int, rank: int | None = None) -> Line:
        """A function of feature `j` on at most `k` nodes."""
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

    def pair(self, i: int, j: int, k: int, fine: bool = False) -> Pair:
        """An interaction on a grid of at most `k` nodes a side."""
        rank = _FINE_RANK if fine else self.rank
        return Pair.of(self.line(i, k, rank), self.line(j, k, rank), fine)


def per_term(terms: Sequence[Term], edf: Array) -> Array:
    """`[groups, q] -> [terms, q]`."""
    starts = np.cumsum([0] + [len(term.groups) for term in terms])[:-1]
    return np.add.reduceat(edf, starts, axis=0) if len(terms) else edf[:0]


def with_pairs(
    fit: Any,
    build: Builder,
    samples: Samples,
    interactions: int | str | Sequence[tuple[int, int]],
    max_nodes: int,
    random: np.random.Generator,
    solve: Callable[[Sequence[Term], Any], Any],
) -> Any:
    """The fit with the pairs that were asked for, or that cross-validation confirms."""
    lines = fit.terms
    used = dict(zip([term.features[0] for term in lines], per_term(lines, fit.edf).max(axis=1), strict=True))
    candidates = sorted(used, key=lambda j: (-used[j], j))
    size = int(np.clip(round(2 * samples.total ** (1 / 3)), _PAIR_NODES[0], _FINE_NODES))

    few = samples.total < _FINE_SAMPLES
    values = {j: len(np.unique(samples.X[:, j])) for j in used}
    room = max_nodes - sum(term.size for term in lines)

    def pairs_of(pairs: Sequence[tuple[int, int]], most: float, fine: bool = False) -> list[Pair]:
        side = min(size, _FINE_NODES if fine else _PAIR_NODES[1])
        while side >= 2 and sum(min(side, values[i]) * min(side, values[j]) for i, j in pairs) > most:
            side -= 1
        return [build.pair(i, j, side, fine) for i, j in pairs] if side >= 2 else []

    def solved(before: Any, fine: Sequence[tuple[int, int]], coarse: Sequence[tuple[int, int]]) -> Any:
        terms = pairs_of(fine, room, fine=not few) if fine else []
        rest = room - sum(term.size for term in terms)
        terms += pairs_of(coarse, rest) if coarse else []
        return solve([*lines, *terms], before) if terms else None

    if interactions == 0 or len(samples.X) < 10 or len(samples.folds) < 2:
        return fit
    if interactions == "auto":
        return _confirmed(
            fit, lambda fit: rank_pairs(samples, fit.rest(samples), candidates, random), solved, samples.total
        )
    if isinstance(interactions, (int, str)):
        asked = [pair for _, pair in rank_pairs(samples, fit.rest(samples), candidates, random)[: int(interactions)]]
    else:
        given = sorted({(min(pair), max(pair)) for pair in interactions})
        asked = [(i, j) for i, j in given if i in used and j in used]
    if not asked:
        return fit
    found = solved(fit, asked, [])
    if found is None:
        raise ValueError(
            f"max_nodes={max_nodes} leaves no room for {len(asked)} interactions beside {max_nodes - room} nodes of "
            "single features; raise it."
        )
    return found


def _confirmed(
    fit: Any, rank: Callable[[Any], list[tuple[float, tuple[int, int]]]], solved: Callable[..., Any], total: float
) -> Any:
    """First the pairs that stand out, in fine form; then many coarse ones, if there is anything in all that are left;
    then fine forms of the most variable of those. Each as far as cross-validation confirms it.
    """
    best, fine, ranked = fit, [], rank(fit)
    strong = [pair for energy, pair in ranked if energy > _STRONG][:_FINE_PAIRS]
    if strong and total >= _FINE_SAMPLES:
        larger = solved(fit, strong, [])
        if larger is not None and better(larger, fit):
            best, fine = larger, strong
            ranked = [(energy, pair) for energy, pair in rank(best) if pair not in fine]
    energy = np.array([energy for energy, _ in ranked])
    if not len(energy) or (total >= _TELLING and (energy - _CHANCE).sum() < _EVIDENCE * np.sqrt(len(energy))):
        return best
    larger = solved(best, fine, [pair for _, pair in ranked[:_PAIRS]])
    if larger is None or not better(larger, best):
        return best
    best = larger
    if total < _FINE_SAMPLES:
        return best
    # The gram matrix of each term weighs its coefficients: variances over the samples.
    first = len(fit.terms) + len(fine)
    order = np.argsort([-float(v.sum()) for v in best.variances[first:]], kind="stable")
    coarse = [best.terms[first + k].features for k in order]
    larger = solved(best, [*fine, *coarse[:_FINE_PAIRS]], coarse[_FINE_PAIRS:])
    return larger if better(larger, best) else best


def better(larger: Any, smaller: Any) -> bool:
    """Whether errors of cross-validation `[folds, q]` are clearly smaller, relative to the sizes of the outputs."""
    scale = np.maximum(smaller.errors.sum(axis=0), np.finfo(float).tiny)
    gain = ((smaller.errors - larger.errors) / scale).sum(axis=1)
    return bool(gain.mean() > CERTAIN * gain.std(ddof=1) / np.sqrt(len(gain)))


def mesh_sizes(varying: Sequence[int], n_features: int, n_nodes: int | None, max_nodes: int) -> dict[int, int]:
    """Nodes per feature at the start. Raises a `ValueError` where there are too few for all."""
    if len(varying) > max(max_nodes // 2, 1):
        raise ValueError(
            f"max_nodes={max_nodes} gives less than two nodes to each of the {n_features} features; raise max_nodes to "
            f"at least {2 * n_features}."
        )
    start = _ALONE if len(varying) == 1 else int(np.clip(_SHARED // max(len(varying), 1), _LEAST, _MOST))
    return dict.fromkeys(varying, max(2, min(n_nodes or start, max_nodes // max(len(varying), 1))))


def crowded(fit: Any, wanted: dict[int, int], max_nodes: int) -> list[int]:
    """Features whose functions use most of their nodes, as far as there is room to double them."""
    result, room = [], max_nodes - sum(term.size for term in fit.terms)
    for j, used, term in zip(wanted, per_term(fit.terms, fit.edf), fit.terms, strict=True):
        if used.max(initial=0) > _CROWDED * term.size and wanted[j] <= term.size < _FINEST:
            room -= wanted[j]
            if room >= 0:
                result.append(j)
    return result
