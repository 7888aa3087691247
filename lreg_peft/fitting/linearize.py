"""Linearised subspace refinement: one large step that gradient training does not find.

At the trained state, the outputs are replaced by their linearisation in the trainable parameters, and the loss by its
second-order expansion in the outputs (Gauss-Newton). What is left is a least-squares problem. It is solved in the
dominant right subspace of the weighted Jacobian, where it is well conditioned, and the step is taken as far as it
lowers the true loss.

Source: Cao & Zhang, "Linearised subspace refinement", arXiv 2601.13989. They predict with the linearised model; here
the step goes into the parameters, by a line search.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ..core.checks import number, whole
from ..core.distributed import rank_and_world
from ..core.solve.subspace import dominant_subspace, subspace_cost, subspace_step
from ..modules import accepts, eval_mode, unwrap
from ..rows import (
    BatchData,
    Pairing,
    Rows,
    align,
    batches_of,
    exact_pass,
    find_pairing,
    logits_of,
    loss_kind_of,
    loss_of,
    model_inputs,
    row_loss,
    without_labels,
)
from ..tuner.layer import LRegLayer

Status = Literal["improved", "no_descent", "heldout_rose"]

# The smallest step that the line search tries is 2 ** -_HALVINGS.
_HALVINGS = 12
# Every so many batches is held out if there is no loader for it.
_HOLDOUT = 5

_ADVICE: dict[Status, str] = {
    "improved": "The parameters were improved.",
    "no_descent": "No step lowered the training loss: the state may be a minimum already; else try a larger damping.",
    "heldout_rose": "Every step that lowered the training loss raised the held-out loss: give more data, or try a "
    "lower rank or a larger damping.",
}


@dataclass(frozen=True)
class Candidate:
    """A step that was tried.

    Attributes:
        rank: dimension of its subspace.
        damping: of its least-squares problem, relative to the largest eigenvalue.
        step: factor in (0, 1] at which it lowered the training loss; 0 if there was none.
        loss: mean loss on the training batches there.
        heldout_loss: mean loss on the held-out batches there; None if there are none.
    """

    rank: int
    damping: float
    step: float
    loss: float
    heldout_loss: float | None


@dataclass(frozen=True)
class RefinementRound:
    """One linearisation.

    Attributes:
        taken: the step that was taken; None if none was.
        candidates: one step per rank and damping.
    """

    taken: Candidate | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Refinement:
    """The result of `refine_linearized`.

    Attributes:
        loss_before: mean loss on the training batches before.
        loss_after: the same afterwards.
        heldout_before: mean loss on the held-out batches before; None if there are none.
        heldout_after: the same afterwards.
        rounds: what was tried; the last one took no step if that ended the refinement.
    """

    loss_before: float
    loss_after: float
    heldout_before: float | None
    heldout_after: float | None
    rounds: tuple[RefinementRound, ...]

    @property
    def status(self) -> Status:
        """Whether any step was taken ("improved"), and otherwise why not."""
        if self.rounds[0].taken is not None:
            return "improved"
        return "heldout_rose" if any(candidate.step for candidate in self.rounds[0].candidates) else "no_descent"

    @property
    def message(self) -> str:
        """The status in words, with what to try."""
        return _ADVICE[self.status]


def refine_linearized(
    model: nn.Module,
    data: BatchData,
    *,
    rank: int | Sequence[int] = (8, 32, 128),
    eval_data: BatchData | None = None,
    n_rounds: int = 1,
    damping: float | Sequence[float] = (1e-6, 1e-4, 1e-2),
    columns_at_once: int = 8,
    seed: int = 0,
    show_progress: bool = True,
) -> Refinement:
    """Improve a trained LReg adapter by linearised subspace refinement.

    With J the Jacobian of the outputs in the trainable parameters, H the Hessian of the loss in the outputs and g the
    gradient, the step minimises g.d + d.(J^T H J) d / 2 over the span of the leading eigenvectors of J^T H J, which are
    the dominant right singular vectors of H^(1/2) J. For a fixed encoder at the output of a model and the squared loss,
    the step of full rank and small damping is the exact minimum. Shortcuts inside the network, trained projections and
    every head work as well; there a few rounds pay.

    The model runs in eval mode; buffers, gradients and the modes of modules stay as they are, and the parameters
    change at the very end, all together or not at all. The training loss never rises, nor does the held-out loss if
    there is one. A round costs some three forward and backward passes per batch for each of rank + 8 columns, and
    memory for 3 (rank + 8) numbers in fp64 per trainable parameter: meant for adapters of up to some 10^5 parameters.
    It runs in one process.

    Args:
        model: a model with a trainable LReg adapter, in a `PeftModel` or not.
        data: a data set, or batches as the model takes them, dictionaries of tensors with "labels"; all are kept.
            Losses are means over all their rows (tokens or samples) with a label.
        rank: dimension of the subspace, or several, of which held-out data choose.
        eval_data: held out, as `data`. None holds out every fifth batch of `data` if there are several ranks.
        n_rounds: most linearisations; it ends earlier when no step is taken.
        damping: of the least-squares problem, relative to its largest eigenvalue, or several to try: they cost
            passes for the loss, no products with J. Without held-out data the lowest training loss decides.
        columns_at_once: directions that go through the model together; fewer need less memory.
        seed: of the random start of the subspace.
        show_progress: show a progress bar.

    Returns:
        A `Refinement`. If no step was taken, it says so, and why.

    Raises:
        ValueError: if there is no trainable LReg adapter, no row with a label or no batch to hold out, the labels do
            not fit the outputs, the model's own loss is another one, the loss is not finite, or an option is out of
            range.
        TypeError: if a batch is not a dictionary.
        RuntimeError: in a run of several processes.
    """
    ranks = {rank} if isinstance(rank, int) else set(rank)
    dampings = {damping} if isinstance(damping, (int, float)) else set(damping)
    for one in ranks or {0}:
        whole("rank", one, 1)
    for size in dampings or {math.nan}:
        number("damping", size, 0)
    whole("n_rounds", n_rounds, 1)
    whole("columns_at_once", columns_at_once, 1)
    if rank_and_world()[1] > 1:
        raise RuntimeError("refine_linearized runs in one process: save the adapter and refine it in a run of its own.")
    inner = unwrap(model)
    start = values = _trainable(inner)
    rounds: list[RefinementRound] = []
    # The fused attention kernels have no forward-mode derivative.
    with eval_mode(inner), sdpa_kernel(SDPBackend.MATH):
        train, heldout = _data(inner, data, eval_data, needs_holdout=len(ranks) > 1)
        before = now = train.loss(values), None if heldout is None else heldout.loss(values)
        if not math.isfinite(before[0]):
            raise ValueError(f"the training loss is {before[0]} before any step: there is nothing to linearise.")
        for i in range(n_rounds):
            with tqdm(desc=f"LReg refinement, round {i + 1}", disable=not show_progress) as bar:
                problem = _Linearised(train, values, columns_at_once, bar)
                steps = list(problem.steps(ranks, dampings, seed + i))
            tried = {}
            for size, relative, step in steps:
                factor, loss, state = _line_search(train, problem, step, now[0])
                held = heldout.loss(state) if heldout and factor else now[1]
                tried[Candidate(size, relative, factor, loss, held)] = state
            taken = _best(list(tried), now[1])
            rounds.append(RefinementRound(taken, tuple(tried)))
            if taken is None:
                break
            now, values = (taken.loss, taken.heldout_loss), tried[taken]
    if values is not start:
        with torch.no_grad():
            for name, parameter in inner.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
    return Refinement(before[0], now[0], before[1], now[1], tuple(rounds))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that the refinement may change, detached."""
    shortcuts = {id(p) for layer in model.modules() if isinstance(layer, LRegLayer) for p in layer.parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(id(parameter) in shortcuts for parameter in trainable.values()):
        raise ValueError(
            "the model has no LReg adapter that is being trained: call get_peft_model(model, LRegConfig(...)), load "
            "one with is_trainable=True, or activate one by set_adapter."
        )
    return {name: parameter.detach() for name, parameter in trainable.items()}


def _best(candidates: list[Candidate], heldout_loss: float | None) -> Candidate | None:
    """The candidate to take: it lowered the training loss, did not raise the held-out one, and is the best of these."""
    if heldout_loss is None:
        return min((c for c in candidates if c.step), key=lambda c: c.loss, default=None)
    fine = [(c.heldout_loss, c) for c in candidates if c.step and c.heldout_loss is not None]
    return min((pair for pair in fine if pair[0] <= heldout_loss), key=lambda pair: pair[0], default=(0.0, None))[1]


class _Data:
    """Labelled batches, and what the model makes of them as a function of its parameters.

    Attributes:
        batches: those that hold a row with a label.
        sizes: how many each holds.
        pairing: how the model makes its loss of them.
    """

    def __init__(self, model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
        self.model = model
        self.batches: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        pairing: Pairing | None = None
        for batch in batches:
            inputs = model_inputs(model, batch)
            with exact_pass(model):
                logits = self._logits({}, inputs)
                loss_kind_of(model, inputs["labels"], _width(logits))  # before labels meet the model's loss
                size = len(_aligned(logits, inputs["labels"], pairing).targets)
                if pairing is None and size:
                    own = loss_of(model(**model_inputs(model, batch))) if accepts(model, "labels") else None
                    pairing = find_pairing(model, logits, inputs["labels"], own)
                    size = len(_aligned(logits, inputs["labels"], pairing).targets)
            if size:
                self.batches.append(inputs)
                self.sizes.append(size)
        if pairing is None:
            raise ValueError("the batches hold no row with a label.")
        self.pairing = pairing

    def _logits(self, values: dict[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        own = model_inputs(self.model, without_labels(self.model, inputs), labels=False)
        output = functional_call(self.model, values, args=(), kwargs=own)
        logits = logits_of(output)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} must return a tensor or an output with logits, got "
                f"{type(output).__name__}."
            )
        return logits

    def rows(self, values: dict[str, Tensor], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits `[n, out_features]` and targets of a batch, padding and ignored labels left out."""
        return _aligned(self._logits(values, batch), batch["labels"], self.pairing)

    @torch.no_grad()
    def loss(self, values: dict[str, Tensor]) -> float:
        """Mean loss over all rows, with these values of the trainable parameters."""
        total = 0.0
        for n, batch in zip(self.sizes, self.batches, strict=True):
            total += n * row_loss(self.pairing.loss_kind, *self.rows(values, batch)).item()
        return total / sum(self.sizes)


def _width(logits: Tensor) -> int:
    return logits.shape[-1] if logits.ndim > 1 else 1


def _aligned(logits: Tensor, labels: Tensor, pairing: Pairing | None) -> Rows:
    return align(logits, labels, shift=pairing is not None and pairing.shift, out_features=_width(logits))


def _data(
    model: nn.Module,
    data: BatchData,
    eval_data: BatchData | None,
    needs_holdout: bool,
) -> tuple[_Data, _Data | None]:
    """Training and held-out data."""
    batches = list(batches_of(data))
    if not batches:
        raise ValueError("the data are empty.")
    if eval_data is not None:
        return _Data(model, batches), _Data(model, list(batches_of(eval_data)))
    if not needs_holdout:
        return _Data(model, batches), None
    if len(batches) == 1:
        raise ValueError("ranks are chosen on held-out data, and there is one batch: give eval_data or one rank.")
    held = set(range(_HOLDOUT - 1, len(batches), _HOLDOUT)) or {len(batches) - 1}
    kept = [batch for i, batch in enumerate(batches) if i not in held]
    return _Data(model, kept), _Data(model, [batches[i] for i in sorted(held)])


class _Linearised:
    """Gradient and Gauss-Newton matrix of the mean loss at one state; vectors are fp64 and flat."""

    def __init__(self, data: _Data, values: dict[str, Tensor], columns_at_once: int, bar: Any) -> None:
        self._data = data
        self._values = values
        self._columns_at_once = columns_at_once
        self._bar = bar
        self.size = sum(value.numel() for value in values.values())

    def steps(self, ranks: set[int], dampings: set[float], seed: int) -> Iterator[tuple[int, float, Tensor]]:
        """Rank, damping and step `[size]`, of every combination."""
        products, columns = subspace_cost(self.size, max(ranks))
        self._bar.total = products * len(self._data.sizes) * -(-columns // self._columns_at_once)
        values, vectors = dominant_subspace(self.multiply, self.size, max(ranks), seed=seed)
        gradient = self.gradient()
        for rank in sorted({min(rank, len(values)) for rank in ranks}):
            for damping in sorted(dampings):
                absolute = damping * values[0].item()
                yield rank, damping, subspace_step(gradient, values[:rank], vectors[:, :rank], absolute)

    def gradient(self) -> Tensor:
        """`[size]`."""
        total = torch.zeros(self.size, 1, dtype=torch.float64, device="cpu")
        for n, local in self._batches():
            total += n * self._flat(local.pull(local.slope)[0], 1)
        return total[:, 0]

    def multiply(self, block: Tensor) -> Tensor:
        """J^T H J times `[size, k]`."""
        total = torch.zeros_like(block)
        for n, local in self._batches():
            for columns in torch.arange(block.shape[1], device="cpu").split(self._columns_at_once):
                product = vmap(local.multiply)(self._tree(block[:, columns]))
                total[:, columns] += n * self._flat(product, len(columns))
                self._bar.update()
        return total

    def moved(self, step: Tensor) -> dict[str, Tensor]:
        """The state after a step `[size]`."""
        tree = self._tree(step.unsqueeze(1))
        return {name: value + tree[name][0] for name, value in self._values.items()}

    def _batches(self) -> Iterator[tuple[float, "_LocalModel"]]:
        """Share of the rows and local model of every batch."""
        for n, batch in zip(self._data.sizes, self._data.batches, strict=True):
            yield n / sum(self._data.sizes), _LocalModel(self._data, self._values, batch)

    def _tree(self, block: Tensor) -> dict[str, Tensor]:
        """`[size, k]` as one tensor `[k, ...]` per parameter."""
        parts = block.T.split([value.numel() for value in self._values.values()], dim=1)
        return {
            name: part.reshape(len(part), *value.shape).to(value)
            for part, (name, value) in zip(parts, self._values.items(), strict=True)
        }

    def _flat(self, tree: dict[str, Tensor], k: int) -> Tensor:
        """The opposite of `_tree`."""
        return torch.cat([tree[name].reshape(k, -1).cpu().double() for name in self._values], dim=1).T


class _LocalModel:
    """The outputs of one batch to first order, and its mean loss to second order in the outputs.

    Attributes:
        slope: gradient of the loss in the outputs, `[n, out_features]`.
        pull: from a direction in the outputs to one in the parameters, J^T.
    """

    def __init__(self, data: _Data, values: dict[str, Tensor], batch: Mapping[str, Any]) -> None:
        self._values = values
        self._outputs = partial(data.rows, batch=batch)
        logits, self.pull, targets = vjp(self._outputs, values, has_aux=True)  # type: ignore[misc]
        # The Hessian is symmetric: its pullback is the product with it.
        self.slope, self._bend = vjp(grad(partial(row_loss, data.pairing.loss_kind, targets=targets)), logits)  # type: ignore[misc]

    def multiply(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """J^T H J times a direction in the parameters."""
        tangent = jvp(lambda values: self._outputs(values)[0], (self._values,), (direction,))[1]
        return self.pull(self._bend(tangent)[0])[0]


def _line_search(
    data: _Data, problem: _Linearised, step: Tensor, loss: float
) -> tuple[float, float, dict[str, Tensor]]:
    """The first of 1, 1/2, 1/4, ... times `step` that lowers the loss: factor, loss and state; 0 if none does."""
    for halvings in range(_HALVINGS + 1):
        moved = problem.moved(step * 0.5**halvings)
        after = data.loss(moved)
        if after < loss:  # not if it is NaN
            return 0.5**halvings, after, moved
    return 0.0, loss, {}
