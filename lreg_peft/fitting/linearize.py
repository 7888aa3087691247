"""Linearised subspace refinement: one large step that gradient training does not find.

At the trained state, the outputs are replaced by their linearisation in the trainable parameters, and the loss by its
second-order expansion in the outputs (Gauss-Newton). What is left is a least-squares problem. It is solved in the
dominant right subspace of the weighted Jacobian, where it is well conditioned, and the step is taken as far as it
lowers the true loss.

Source: Cao & Zhang, "Linearised subspace refinement", arXiv 2601.13989. They predict with the linearised model; here
the step goes into the parameters, by a line search.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ..core.solve.subspace import dominant_subspace, subspace_step
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
    width_of,
    without_labels,
)
from ..tuner.layer import LRegLayer

# The smallest step that the line search tries is 2 ** -_HALVINGS.
_HALVINGS = 12
# Every so many batches is held out if there is no loader for it.
_HOLDOUT = 5

#: Values of the trainable parameters, or a direction in them, by name.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """A step that was taken.

    Attributes:
        rank: dimension of its subspace.
        damping: of its least-squares problem, relative to the largest eigenvalue.
        factor: in (0, 1], by which it was scaled so that the training loss fell.
        loss: mean loss on the training batches after it.
        heldout_loss: mean loss on the held-out batches after it; None if there are none.
    """

    rank: int
    damping: float
    factor: float
    loss: float
    heldout_loss: float | None


@dataclass(frozen=True)
class Refinement:
    """The result of `refine_linearized`.

    Attributes:
        loss_before: mean loss on the training batches before.
        loss_after: the same afterwards.
        heldout_before: mean loss on the held-out batches before; None if there are none.
        heldout_after: the same afterwards.
        steps: one for every round that took one.
        status: "improved" if any step was taken. "no_descent": no step lowered the training loss; the state may be a
            minimum already, else try a larger damping. "heldout_rose": every step that did raised the held-out loss;
            give more data, or try a lower rank or a larger damping.
    """

    loss_before: float
    loss_after: float
    heldout_before: float | None
    heldout_after: float | None
    steps: tuple[Step, ...]
    status: Literal["improved", "no_descent", "heldout_rose"]


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
    for relative in dampings or {math.nan}:
        number("damping", relative, 0)
    whole("n_rounds", n_rounds, 1)
    whole("columns_at_once", columns_at_once, 1)
    if rank_and_world()[1] > 1:
        raise RuntimeError("refine_linearized runs in one process: save the adapter and refine it in a run of its own.")
    inner = unwrap(model)
    start = state = _trainable(inner)
    train_batches, heldout_batches = _split(data, eval_data, needs_holdout=len(ranks) > 1)
    steps: list[Step] = []
    heldout_rose = False
    # The fused attention kernels have no forward-mode derivative.
    with eval_mode(inner), sdpa_kernel(SDPBackend.MATH):
        train = _MeanLoss(inner, train_batches)
        heldout = _MeanLoss(inner, heldout_batches) if heldout_batches else None
        before = now = train.at(state), None if heldout is None else heldout.at(state)
        if not math.isfinite(before[0]):
            raise ValueError(f"the training loss is {before[0]} before any step: there is nothing to linearise.")
        for i in range(n_rounds):
            multiply = partial(train.curvature, state, columns_at_once=columns_at_once, hidden=not show_progress)
            size = sum(value.numel() for value in state.values())
            values, vectors = dominant_subspace(multiply, size, max(ranks), seed=seed + i)
            gradient = train.gradient(state)
            best: tuple[float, Step, State] | None = None
            for k in sorted({min(rank, len(values)) for rank in ranks}):
                for relative in sorted(dampings):
                    step = subspace_step(gradient, values[:k], vectors[:, :k], relative * values[0].item())
                    factor, loss, moved = _line_search(train, state, step, now[0])
                    if not factor:
                        continue
                    held = None if heldout is None else heldout.at(moved)
                    if held is not None and now[1] is not None and not held <= now[1]:
                        heldout_rose = True
                        continue
                    judged = loss if held is None else held
                    if best is None or judged < best[0]:
                        best = judged, Step(k, relative, factor, loss, held), moved
            if best is None:
                break
            _, taken, state = best
            steps.append(taken)
            now = taken.loss, taken.heldout_loss
    if state is not start:
        with torch.no_grad():
            for name, value in state.items():
                inner.get_parameter(name).copy_(value)
    status: Any = "improved" if steps else "heldout_rose" if heldout_rose else "no_descent"
    return Refinement(before[0], now[0], before[1], now[1], tuple(steps), status)


def _trainable(model: nn.Module) -> State:
    """The parameters that the refinement may change, detached."""
    shortcuts = {id(p) for layer in model.modules() if isinstance(layer, LRegLayer) for p in layer.parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(id(parameter) in shortcuts for parameter in trainable.values()):
        raise ValueError(
            "the model has no LReg adapter that is being trained: call get_peft_model(model, LRegConfig(...)), load "
            "one with is_trainable=True, or activate one by set_adapter."
        )
    return {name: parameter.detach() for name, parameter in trainable.items()}


def _split(data: BatchData, eval_data: BatchData | None, needs_holdout: bool) -> tuple[list[Any], list[Any]]:
    """Batches to fit and batches to judge by; none of the latter unless they are given or needed."""
    batches = list(batches_of(data))
    if not batches:
        raise ValueError("the data are empty.")
    if eval_data is not None:
        return batches, list(batches_of(eval_data))
    if not needs_holdout:
        return batches, []
    if len(batches) == 1:
        raise ValueError("ranks are chosen on held-out data, and there is one batch: give eval_data or one rank.")
    held = range(min(_HOLDOUT, len(batches)) - 1, len(batches), _HOLDOUT)
    return [batch for i, batch in enumerate(batches) if i not in held], [batches[i] for i in held]


class _MeanLoss:
    """The mean loss over the rows of some batches, as a function of the trainable parameters.

    Directions in the parameters are also written as flat vectors, fp64 on the CPU, in the order of a state.

    Args:
        model: the model, in eval mode.
        batches: as the model takes them; those without a row that has a label are left out.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self._model = model
        self._batches: list[tuple[int, dict[str, Any]]] = []  # rows, and inputs on the device of the model
        pairing: Pairing | None = None
        for batch in batches:
            inputs = model_inputs(model, batch)
            labels = inputs["labels"]
            with exact_pass(model):
                logits = self._logits({}, inputs)
                loss_kind_of(model, labels, width_of(logits))  # before labels meet the model's loss
                own = None
                if pairing is None and accepts(model, "labels"):
                    align(logits, labels, shift=False, out_features=width_of(logits))  # likewise
                    own = loss_of(model(**model_inputs(model, batch)))
                found = pairing or find_pairing(model, logits, labels, own)
            n = len(align(logits, labels, shift=found.shift, out_features=width_of(logits)).targets)
            if n:
                pairing = found
                self._batches.append((n, inputs))
        if pairing is None:
            raise ValueError("the batches hold no row with a label.")
        self._pairing = pairing
        self._n_rows = sum(n for n, _ in self._batches)

    def _logits(self, state: State, inputs: Mapping[str, Any]) -> Tensor:
        own = model_inputs(self._model, without_labels(self._model, inputs), labels=False)
        output = functional_call(self._model, state, args=(), kwargs=own)
        logits = logits_of(output)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self._model).__name__} must return a tensor or an output with logits, got "
                f"{type(output).__name__}."
            )
        return logits

    def _rows(self, state: State, inputs: Mapping[str, Any]) -> Rows:
        """Logits and targets of a batch, padding and ignored labels left out."""
        logits = self._logits(state, inputs)
        return align(logits, inputs["labels"], shift=self._pairing.shift, out_features=width_of(logits))

    def _parts(self) -> Iterator[tuple[float, Any]]:
        """Of every batch its share of the rows, and its rows as a function of the state."""
        for n, inputs in self._batches:
            yield n / self._n_rows, partial(self._rows, inputs=inputs)

    @torch.no_grad()
    def at(self, state: State) -> float:
        """The loss."""
        return sum(share * row_loss(self._pairing.loss_kind, *rows(state)).item() for share, rows in self._parts())

    def gradient(self, state: State) -> Tensor:
        """`[size]`."""
        total: Any = 0
        for share, rows in self._parts():
            slope = grad(lambda state, rows=rows: row_loss(self._pairing.loss_kind, *rows(state)))(state)
            total = total + share * torch.cat([part.flatten().cpu().double() for part in slope.values()])
        return total  # type: ignore[no-any-return]

    def curvature(self, state: State, block: Tensor, *, columns_at_once: int, hidden: bool) -> Tensor:
        """J^T H J times `[size, k]`, J the Jacobian of the outputs and H the Hessian of the loss in them."""
        total = torch.zeros_like(block)
        parts = tqdm(self._parts(), desc="LReg refinement", total=len(self._batches), disable=hidden, leave=False)
        for share, rows in parts:
            logits, pull, targets = vjp(rows, state, has_aux=True)  # type: ignore[misc]
            # The Hessian is symmetric: its pullback is the product with it.
            _, bend = vjp(grad(partial(row_loss, self._pairing.loss_kind, targets=targets)), logits)  # type: ignore[misc]

            def product(direction: State, rows: Any = rows, pull: Any = pull, bend: Any = bend) -> State:
                _, tangent = jvp(lambda state: rows(state).features, (state,), (direction,))  # type: ignore[misc]
                return pull(bend(tangent)[0])[0]  # type: ignore[no-any-return]

            for columns in torch.arange(block.shape[1], device="cpu").split(columns_at_once):
                image = vmap(product)(_unflatten(block[:, columns], state))
                flat = [part.flatten(1).cpu().double() for part in image.values()]
                total[:, columns] += share * torch.cat(flat, dim=1).T
        return total


def _unflatten(block: Tensor, state: State) -> State:
    """`[size, k]` as one tensor `[k, ...]` per parameter."""
    parts = block.T.split([value.numel() for value in state.values()], dim=1)
    return {
        name: part.reshape(len(part), *value.shape).to(value)
        for part, (name, value) in zip(parts, state.items(), strict=True)
    }


def _line_search(train: _MeanLoss, state: State, step: Tensor, loss: float) -> tuple[float, float, State]:
    """The first of 1, 1/2, 1/4, ... times `step` that lowers the loss: factor, loss and state; 0 if none does."""
    for factor in (0.5**halvings for halvings in range(_HALVINGS + 1)):
        change = _unflatten(factor * step.unsqueeze(1), state)
        moved = {name: value + change[name][0] for name, value in state.items()}
        after = train.at(moved)
        if after < loss:  # not if it is NaN
            return factor, after, moved
    return 0.0, loss, state
