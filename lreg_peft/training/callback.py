"""Mesh adaptation in a Transformers `Trainer`: when to call `update_meshes`, and what to log. No mathematics."""

import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..core.adapt.move import Strategy, check_strategy
from ..core.checks import number, whole
from ..modules import eval_mode
from ..rows import loss_of
from ..tuner.penalty import add_penalty_gradient, curvature_penalty, is_penalised
from .mesh_update import MeshUpdate, update_meshes
from .statistics import track_statistics

#: Computes the loss that a move is judged by: of the model, on the inputs of a recent training batch.
CheckLoss = Callable[[nn.Module, dict[str, Any]], Tensor]

# A size so small that nodes hardly slide any more.
_SMALLEST_SIZE = 1 / 64


class LRegCallback(TrainerCallback, ExportableState):
    """Moves the meshes of an LReg adapter while a `Trainer` trains it.

    Each move is tried on the last few training batches, in eval mode, and undone if the loss on them rises. Then the
    next one is half as large; an accepted move restores the size. The loss is the one that the model returns. Where it
    returns none, since the Trainer takes the labels out of the batch (label smoothing, `compute_loss_func`), give a
    `check_loss`.

    With a `curvature_weight` the gradient of `curvature_penalty(model)` is added in every step of the optimiser, after
    gradients are clipped.

    Every training begins with the given size and counters at zero, unless it resumes from a checkpoint.

    The Trainer's training logs (`log_history` and every reporter that was added after this callback) also get
    `lreg_moves_accepted`, `lreg_moves_refused` and, with a `curvature_weight`, `lreg_curvature_penalty`. Reporters
    named in `report_to` come first in a Trainer's list; for these to see the entries,
    `trainer.callback_handler.callbacks.insert(0, LRegCallback(...))` adds it in front.

    With `TrainingArguments(restore_callback_states_from_checkpoint=True)` its state survives
    `resume_from_checkpoint`, all but `check_loss`, which no file can hold. Statistics since the last move are not
    saved: a checkpoint in whose step the meshes moved resumes exactly, another one moves next time by the steps after
    it alone.

    Args:
        every: move after this many steps of the optimiser.
        stop: fraction of the training after which nothing moves; the coefficients settle on their final mesh then.
        strategy: see `update_meshes`.
        n_refine: see `update_meshes`.
        size: size of the first move, see `core.adapt.adapt_mesh`.
        n_check_batches: training batches to try a move on; 0 keeps every move (what `"paper"` needs: its moves pay
            only after the coefficients have followed).
        check_loss: called as `check_loss(model, inputs)` for each of these, the inputs by name as the model got them;
            returns the loss. None takes the loss that the model returns.
        tolerance: how far the loss on these may rise for a move to be kept, relative to the loss.
        adapter_name: which adapter; None takes the active ones of every layer.
        n_hard_samples: hits per backward pass, for `"paper"` only; see `track_statistics`.

    Raises:
        TypeError: for options of a wrong type.
        ValueError: for options out of range; when training begins, if the model has no mesh that can move.
        RuntimeError: when a move is due, if there is no batch to try it on or the model returns no loss for it.

    Warns:
        UserWarning: when training ends, if it was too short for one move.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        stop: float = 0.75,
        strategy: Strategy = "relocate",
        n_refine: int | None = None,
        size: float = 1.0,
        n_check_batches: int = 2,
        check_loss: CheckLoss | None = None,
        tolerance: float = 0.0,
        adapter_name: str | None = None,
        n_hard_samples: int = 32,
    ) -> None:
        whole("every", every, 1)
        whole("n_refine", n_refine, 0, optional=True)
        whole("n_check_batches", n_check_batches, 0)
        whole("n_hard_samples", n_hard_samples, 1)
        number("tolerance", tolerance, 0)
        number("size", size, above=0, highest=1)
        number("stop", stop, above=0, highest=1)
        check_strategy(strategy)
        self._options: dict[str, Any] = {
            "every": every,
            "stop": stop,
            "strategy": strategy,
            "n_refine": n_refine,
            "size": size,
            "n_check_batches": n_check_batches,
            "tolerance": tolerance,
            "adapter_name": adapter_name,
            "n_hard_samples": n_hard_samples,
        }
        #: Size of the next move.
        self.current_size = size
        #: Moves that were kept.
        self.n_accepted = 0
        #: Moves that were undone.
        self.n_refused = 0
        #: What the last `update_meshes` returned.
        self.last_update: MeshUpdate | None = None
        self._model: nn.Module | None = None
        self._check_loss = check_loss
        # The last training batches as the model got them, and the hook that keeps them while statistics are gathered.
        self._calls: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque(maxlen=n_check_batches)
        self._hook: RemovableHandle | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        attributes = {name: getattr(self, name) for name in ("current_size", "n_accepted", "n_refused")}
        return {"args": dict(self._options), "attributes": attributes}

    # Events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start gathering."""
        self._stop_gathering()  # of a training that broke off
        self._model = kwargs["model"]
        if state.global_step == 0:  # not resumed
            self.current_size = self._options["size"]
            self.n_accepted = self.n_refused = 0
            self.last_update = None
        if self._is_open(state):
            by_hits = self._options["strategy"] == "paper"
            track_statistics(
                self._model,
                adapter_name=self._options["adapter_name"],
                n_hard_samples=self._options["n_hard_samples"] if by_hits else None,
            )
            self._hook = self._model.register_forward_pre_hook(self._note, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Penalise curvature, if a configuration asks for it."""
        if not is_penalised(kwargs["model"]):
            return
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not args.max_grad_norm:  # else gradients were unscaled to be clipped
            scaler.unscale_(optimizer.optimizer)
        add_penalty_gradient(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move, if it is time: after the optimiser's step, before evaluation and saving."""
        if self._is_open(state) and state.global_step % self._options["every"] == 0:
            self._move(kwargs["model"], kwargs["optimizer"])
        if not self._is_open(state):
            self._stop_gathering()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the logs of the training loss."""
        if logs is None or "loss" not in logs or self._model is None:
            return
        entries: dict[str, float] = {
            "lreg_moves_accepted": self.n_accepted,
            "lreg_moves_refused": self.n_refused,
        }
        if is_penalised(self._model):
            entries["lreg_curvature_penalty"] = float(curvature_penalty(self._model).detach())
        logs.update(entries)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)  # the Trainer has copied the logs there already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop gathering and take every hook off."""
        self._stop_gathering()
        self._model = None
        if self.last_update is None and not self.n_accepted + self.n_refused:
            warnings.warn(
                f"LRegCallback moved no mesh: a move is due every {self._options['every']} steps, until step "
                f"{self._options['stop'] * state.max_steps:.0f}, and the training had {state.global_step} steps. Set a "
                "smaller `every`, or leave the callback out.",
                UserWarning,
                stacklevel=2,
            )

    # What they do

    def _move(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        update = update_meshes(
            model,
            optimizer,
            size=self.current_size,
            accept=partial(self._loss, model) if self._options["n_check_batches"] else None,
            **{name: self._options[name] for name in ("strategy", "adapter_name", "n_refine", "tolerance")},
        )
        self.last_update = update
        self.n_accepted += update.accepted
        self.n_refused += update.refused
        if update.refused:
            self.current_size = max(self.current_size / 2, _SMALLEST_SIZE)
        elif update.accepted:
            self.current_size = self._options["size"]

    def _is_open(self, state: TrainerState) -> bool:
        """Whether meshes may still move."""
        return state.global_step <= self._options["stop"] * state.max_steps

    def _stop_gathering(self) -> None:
        if self._hook is not None and self._model is not None:
            self._hook.remove()
            self._hook = None
            self._calls.clear()
            track_statistics(self._model, False, adapter_name=self._options["adapter_name"])

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keep the last training batches as the model gets them."""
        if model.training and torch.is_grad_enabled():
            self._calls.append((args, dict(kwargs)))

    def _loss(self, model: nn.Module) -> float:
        """The mean over the batches that were kept, in eval mode."""
        if not self._calls:
            raise RuntimeError(
                "there is no training batch to try a move of the meshes on: let the model run in train mode before one "
                "is due, or set LRegCallback(n_check_batches=0) to keep every move."
            )
        with eval_mode(model):
            losses = [self._loss_on(model, args, dict(kwargs)).detach().mean() for args, kwargs in self._calls]
        return float(torch.stack(losses).float().mean())

    def _loss_on(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Tensor:
        if self._check_loss is not None:
            return self._check_loss(model, inputs)
        output = model(*args, **inputs)
        loss = loss_of(output)
        if not isinstance(loss, Tensor):
            raise RuntimeError(
                f"the model returned no loss for a training batch (its output is a {type(output).__name__}), so a move "
                "of the meshes cannot be tried: labels that the Trainer keeps for label smoothing or a "
                "compute_loss_func do not reach the model. Give LRegCallback(check_loss=...), a function of the model "
                "and the inputs of a batch that returns the loss, or set n_check_batches=0 to keep every move."
            )
        return loss
