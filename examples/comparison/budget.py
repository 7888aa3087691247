"""Sizes at a matched number of trainable parameters, and learning-rate grids of matched length."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from comparison.errors import UserError
from comparison.method import Fit, Method
from comparison.methods import METHODS


def count_trainable(model: nn.Module) -> int:
    """Number of parameters an optimiser would move."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Sizes:
    """Counts of every method on one architecture, from models on the meta device that allocate nothing.

    A method that goes to several places stays where `choose` has put it, and before that in its preferred place.

    Args:
        task: gives empty models and their new modules.
        n_nodes: of `--n_nodes`; None lets every method have its own.
        steps: training steps of every method.
    """

    def __init__(self, task: Any, n_nodes: int | None, steps: int | None = None) -> None:
        self._task = task
        self._n_nodes = n_nodes
        self._steps = steps
        self._counts: dict[tuple[str, str, int | None], int] = {}
        self._placements: dict[str, str] = {}

    def placement(self, method: Method) -> str:
        """Where a method goes."""
        return self._placements.get(method.name, method.places(self._task.task_type)[0])

    def fit(self, method: Method, size: int | None) -> Fit:
        """How a method is attached with a size."""
        n_nodes = 2 if method.n_nodes is None else (self._n_nodes or method.n_nodes)
        return Fit(
            self._task.task_type,
            size or 1,
            n_nodes,
            self._task.new_modules,
            self.placement(method),
            self._task.longest_sample,
            self._steps,
        )

    def count(self, method: Method, size: int | None) -> int:
        """Trainable parameters of the method itself: those of new modules, equal for all, are left out."""
        key = method.name, self.placement(method), size
        if key not in self._counts:
            self._counts[key] = self._count(method, size) - self.new_parameters
        return self._counts[key]

    def _count(self, method: Method, size: int | None) -> int:
        model = self._task.random_model() if method.reads_weights else self._task.empty_model()
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
                warnings.filterwarnings("ignore", message=".*on meta device")
                return count_trainable(method.attach(model, self.fit(method, size)))
        except ValueError as error:
            kind = type(model).__name__
            raise UserError(f"The method '{method.name}' cannot be attached to {kind}: {error}") from error

    @cached_property
    def new_parameters(self) -> int:
        """Parameters of the new modules."""
        model = self._task.empty_model()
        return sum(p.numel() for name in self._task.new_modules for p in model.get_submodule(name).parameters())

    def default_budget(self) -> int:
        """What the paper's placement has with two components, or the smallest size of every method if that is more."""
        sized = [method for method in METHODS.values() if self._exists(method) and method.size_name is not None]
        paper = next(method for method in sized if method.name in ("lreg-head", "lreg-attention", "lreg-stage"))
        return max(self.count(paper, 2), *(self.count(method, self._sizes(method)[0]) for method in sized))

    def _exists(self, method: Method) -> bool:
        there = method.by_default and self._task.task_type in method.tasks
        fits = not (method.needs_block and not self._task.has_block) and not (
            method.keeps_head and self._task.new_modules
        )
        return there and fits

    def choose(self, methods: Sequence[Method], budget: int, given: Mapping[str, int]) -> dict[str, int | None]:
        """The largest size with which each method stays within the budget, unless a size is given."""
        sizes: dict[str, int | None] = {}
        too_big = {}
        for method in methods:
            if method.name in given:
                sizes[method.name] = given[method.name]
                continue
            try:
                sizes[method.name] = self.largest(method, budget)
            except BudgetTooSmall as error:
                too_big[method.name] = error.least
        if too_big:
            raise UserError(
                f"A budget of {budget} parameters is impossible: the smallest adapter of "
                + ", ".join(f"{name} has {least}" for name, least in too_big.items())
                + f"; give --budget {max(too_big.values())} or more, or leave the method out."
            )
        return sizes

    def largest(self, method: Method, budget: int) -> int | None:
        """The largest size of a method within the budget, in the first of its places where one is; None without sizes.

        Raises:
            BudgetTooSmall: if there is no such place.
        """
        least = []
        for placement in method.places(self._task.task_type):
            self._placements[method.name] = placement
            if method.size_name is None:
                # A method with neither sizes nor places to choose is compared whatever it has.
                if method.placements == ("",) or self.count(method, None) <= budget:
                    return None
                least.append(self.count(method, None))
                continue
            sizes = self._sizes(method)
            if sizes and self.count(method, sizes[0]) <= budget:
                return budget if method.fills_budget else sizes[self._last_within(method, sizes, budget)]
            least += [self.count(method, size) for size in sizes[:1]]
        raise BudgetTooSmall(method, min(least, default=0))

    def _sizes(self, method: Method) -> Sequence[int]:
        if method.sizes is None:
            return range(1, 1 << 40)
        return method.sizes(self._task.empty_model(), self.fit(method, None))

    def _last_within(self, method: Method, sizes: Sequence[int], budget: int) -> int:
        """Position of the last size within the budget; the first one is.

        The counts grow with the position, mostly in proportion: the next position to look at is where a straight line
        meets the budget, and every other time the middle, so that no shape takes long.
        """
        low, high, beyond = 0, 1, 1
        while high < len(sizes) and self.count(method, sizes[high]) <= budget:
            slope = (self.count(method, sizes[high]) - self.count(method, sizes[low])) / (high - low)
            left = (budget - self.count(method, sizes[high])) / slope if slope > 0 else 0.0
            low, beyond = high, 2 * beyond
            high = min(high + max(beyond, int(left) + 1), max(len(sizes) - 1, high + 1))
        if high >= len(sizes):
            return len(sizes) - 1
        straight = True
        while high - low > 1:
            middle = (low + high) // 2
            if straight:
                counts = [self.count(method, sizes[position]) for position in (low, high)]
                line = low + (budget - counts[0]) * (high - low) // max(counts[1] - counts[0], 1)
                middle = min(max(line, low + 1), high - 1)
            straight = not straight
            low, high = (middle, high) if self.count(method, sizes[middle]) <= budget else (low, middle)
        return low


class BudgetTooSmall(UserError):
    """The smallest size of a method is beyond the budget."""

    def __init__(self, method: Method, least: int) -> None:
        super().__init__(
            f"its smallest size has {least:,} parameters" if least else "the model has no place left for it"
        )
        self.method, self.least = method, least


def learning_rate_grids(
    methods: Sequence[Method],
    n_trials: int,
    ratio: float,
    kind: Literal["offline", "language_model", "classification", "small_encoder", "images"],
    overrides: Sequence[str],
) -> dict[str, list[float]]:
    """The same number of learning rates for every method, a constant ratio apart around its own centre.

    Args:
        kind: which of the centres of a method applies.
        overrides: `NAME=RATE,RATE,...` replaces the grid of one method; its length must be `n_trials`.
    """
    grids = {}
    for method in methods:
        centre = getattr(method.rates, kind)
        grids[method.name] = [
            float(f"{centre * ratio ** (trial - (n_trials - 1) // 2):.3g}") for trial in range(n_trials)
        ]
    for override in overrides:
        name, _, rates = override.partition("=")
        try:
            grid = sorted(float(rate) for rate in rates.split(","))
        except ValueError:
            grid = []
        if name not in METHODS or len(set(grid)) != n_trials or not min(grid, default=0.0) > 0.0:
            raise UserError(
                f"--learning_rates wants NAME=RATE,RATE,... with a method and as many different positive rates as "
                f"--lr_trials ({n_trials}), got '{override}'."
            )
        if name in grids:
            grids[name] = grid
    return grids


def given_sizes(entries: Sequence[str]) -> dict[str, int]:
    """The `NAME=SIZE` entries of `--sizes`."""
    sizes = {}
    for entry in entries:
        name, _, size = entry.partition("=")
        if name not in METHODS or METHODS[name].size_name is None or not size.isdigit() or int(size) < 1:
            sized = ", ".join(method.name for method in METHODS.values() if method.size_name is not None)
            raise UserError(f"--sizes wants NAME=SIZE with one of {sized} and a positive whole number, got '{entry}'.")
        sizes[name] = int(size)
    return sizes
