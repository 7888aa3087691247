"""Sizes at a matched number of trainable parameters, and learning-rate grids of matched length."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from torch import nn

from comparison.errors import UserError
from comparison.methods import METHODS, Fit, Method


def count_trainable(model: nn.Module) -> int:
    """Number of parameters an optimiser would move."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Sizes:
    """Counts of every method on one architecture, from models on the meta device that allocate nothing.

    Args:
        task: gives empty models and their new modules.
        dof: of `--dof`; None lets every method have its own.
    """

    def __init__(self, task: Any, dof: int | None) -> None:
        self._task = task
        self._dof = dof
        self._counts: dict[tuple[str, int | None], int] = {}

    def fit(self, method: Method, size: int | None) -> Fit:
        """How a method is attached with a size."""
        dof = 2 if method.dof is None else (self._dof or method.dof)
        return Fit(self._task.task_type, size or 1, dof, self._task.new_modules)

    def count(self, method: Method, size: int | None) -> int:
        """Trainable parameters of the method itself: those of new modules, equal for all, are left out."""
        key = method.name, size
        if key not in self._counts:
            self._counts[key] = self._count(method, size) - self.new_parameters
        return self._counts[key]

    def _count(self, method: Method, size: int | None) -> int:
        model = self._task.empty_model()
        try:
            with warnings.catch_warnings():
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
        paper = next(method for method in sized if method.name in ("lreg-head", "lreg-attention"))
        return max(self.count(paper, 2), *(self.count(method, 1) for method in sized))

    def _exists(self, method: Method) -> bool:
        return self._task.task_type in method.tasks and (not method.needs_block or self._task.has_block)

    def choose(self, methods: Sequence[Method], budget: int, given: Mapping[str, int]) -> dict[str, int | None]:
        """The largest size with which each method stays within the budget, unless a size is given."""
        sizes: dict[str, int | None] = {}
        too_big = {}
        for method in methods:
            if method.size_name is None:
                sizes[method.name] = None
            elif method.name in given:
                sizes[method.name] = given[method.name]
            elif (least := self.count(method, 1)) > budget:
                too_big[method.name] = least
            else:
                sizes[method.name] = self._largest(method, budget)
        if too_big:
            raise UserError(
                f"A budget of {budget} parameters is impossible: the smallest adapter of "
                + ", ".join(f"{name} has {least}" for name, least in too_big.items())
                + f"; give --budget {max(too_big.values())} or more, or leave the method out."
            )
        return sizes

    def _largest(self, method: Method, budget: int) -> int:
        """Doubling, then bisection: the count grows with the size, though not in proportion."""
        low, high = 1, 2
        while self.count(method, high) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.count(method, middle) <= budget else (low, middle)
        return low


def learning_rate_grids(
    methods: Sequence[Method],
    n_trials: int,
    ratio: float,
    kind: Literal["offline", "language_model", "classification", "small_encoder"],
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
