"""Sizes at a matched number of trainable parameters, and learning-rate grids of matched length."""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from examples.comparison.methods import METHODS, Fit, Method
from examples.comparison.options import UserError
from examples.comparison.task import Task


def count_trainable(model: nn.Module) -> int:
    """Number of parameters an optimiser would move."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Sizes:
    """Counts of every method on one architecture, from models on the meta device that allocate nothing.

    Args:
        task: gives empty models and their new modules.
        n_nodes: of `--n_nodes`; None lets every method have its own.
        steps: training steps of every method.
    """

    def __init__(self, task: Task, n_nodes: int | None = None, steps: int = 1) -> None:
        self._task, self._n_nodes, self._steps = task, n_nodes, steps
        self._counts: dict[tuple[str, str, int | None], int] = {}
        new = (task.empty_model().get_submodule(name) for name in task.new_modules)
        #: Parameters of the new modules, the same for all methods.
        self.new_parameters = sum(parameter.numel() for module in new for parameter in module.parameters())

    def nodes(self, method: Method) -> int | None:
        """Nodes per component; None for methods without a mesh."""
        return None if method.n_nodes is None else self._n_nodes or method.n_nodes

    def fit(self, method: Method, size: int | None, seed: int = 0) -> Fit:
        """How a method is attached with a size."""
        return Fit(self._task, size or 1, self.nodes(method) or 2, self._steps, seed)

    def count(self, method: Method, size: int | None) -> int:
        """Trainable parameters of the method itself: those of new modules, equal for all, are left out."""
        key = method.name, method.place, size
        if key not in self._counts:
            model = self.model_to_count(method)
            try:
                with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
                    warnings.filterwarnings("ignore", message=".*on meta device")
                    attached = method.attach(model, self.fit(method, size), None)
            except ValueError as error:
                kind = type(model).__name__
                raise UserError(f"The method '{method.name}' cannot be attached to {kind}: {error}") from error
            self._counts[key] = count_trainable(attached) - self.new_parameters
        return self._counts[key]

    def model_to_count(self, method: Method) -> PreTrainedModel:
        """The base model that parameters are counted on."""
        return self._task.empty_model()

    def sizes(self, method: Method) -> Sequence[int]:
        """What a method with sizes can have, by rising counts."""
        if method.sizes is None:
            return range(1, 1 << 40)
        return method.sizes(self._task.empty_model(), self.fit(method, None))

    def default_budget(self, methods: Sequence[Method] = tuple(METHODS.values())) -> int:
        """What the paper's placement has with two components, or the smallest size of every method if that is more."""
        there = [method for method in methods if self._task.task_type in method.tasks]
        sized = [method for method in there if method.size_name not in (None, "parameters")]
        least = [self.count(method, self.sizes(method)[0]) for method in sized]
        return max(*least, *(self.count(method, 2) for method in sized if method.is_paper))

    def choose(self, methods: Sequence[Method], budget: int, given: Mapping[str, int]) -> dict[str, int | None]:
        """The largest size with which each method stays within the budget, unless a size is given.

        Raises:
            UserError: if the smallest size of a method is beyond the budget.
        """
        chosen: dict[str, int | None] = {}
        too_big = {}
        for method in methods:
            if method.name in given or method.size_name in (None, "parameters"):
                chosen[method.name] = given.get(method.name, budget if method.size_name else None)
                continue
            sizes = self.sizes(method)
            if not sizes or (least := self.count(method, sizes[0])) > budget:
                too_big[method.name] = least if sizes else 0
            else:
                chosen[method.name] = self.largest(method, sizes, budget)
        if too_big:
            raise UserError(
                f"A budget of {budget} parameters is impossible: the smallest adapter of "
                + ", ".join(f"{name} has {least}" for name, least in too_big.items())
                + f"; give --budget {max(too_big.values())} or more, or leave the method out."
            )
        for method in methods:
            self.count(method, chosen[method.name])  # a number of parameters may be too small for any adapter
        return chosen

    def largest(self, method: Method, sizes: Sequence[int], budget: int) -> int:
        """The last of its sizes within a budget that the first one keeps."""
        end = 1
        while end < len(sizes) and self.count(method, sizes[end]) <= budget:
            end = min(2 * end, len(sizes))
        found = bisect_right(sizes, budget, end // 2, end, key=lambda size: self.count(method, size))
        return sizes[max(found, 1) - 1]


def learning_rate_grids(
    methods: Sequence[Method], task: Task, n_trials: int, ratio: float, overrides: Sequence[str]
) -> dict[str, list[float]]:
    """The same number of learning rates for every method, a constant ratio apart around its own centre.

    Args:
        methods: of the comparison.
        task: says which centres apply.
        n_trials: rates for each of them.
        ratio: of neighbouring rates.
        overrides: `NAME=RATE,RATE,...` replaces the grid of one method; its length must be `n_trials`.
    """
    grids = {}
    for method in methods:
        centre = method.rates[task.rates]
        grids[method.name] = [
            float(f"{centre * ratio ** (trial - (n_trials - 1) // 2):.3g}") for trial in range(n_trials)
        ]
    for override in overrides:
        name, _, rates = override.partition("=")
        try:
            grid = sorted(float(rate) for rate in rates.split(","))
        except ValueError:
            grid = []
        if len(set(grid)) != n_trials or not min(grid, default=0.0) > 0.0:
            raise UserError(
                f"--learning_rates wants NAME=RATE,RATE,... with a method and as many different positive rates as "
                f"--lr_trials ({n_trials}), got '{override}'."
            )
        if name in grids:
            grids[name] = grid
    return grids


def given_sizes(entries: Sequence[str], methods: Sequence[Method]) -> dict[str, int]:
    """The `NAME=SIZE` entries of `--sizes`."""
    sized = [method.name for method in methods if method.size_name is not None]
    sizes = {}
    for entry in entries:
        name, _, size = entry.partition("=")
        if name not in sized or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--sizes wants NAME=SIZE with one of {', '.join(sized)} and a positive whole number, got '{entry}'."
            )
        sizes[name] = int(size)
    return sizes
