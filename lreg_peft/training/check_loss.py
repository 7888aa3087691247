"""The training loss on the last few batches of a `Trainer`, computed as the Trainer computes it."""

import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..modules import eval_mode

_KEEP_EVERY_MOVE = "set LRegCallback(n_check_batches=0) to keep every move"


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is calling this callback: callbacks are handed the model, but not who computes its loss."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


class RecentBatches:
    """Keeps the last training batches, to compute the loss on them again.

    Batches are kept as the model gets them, labels and all. Where a Trainer takes the labels out, for label smoothing
    or a `compute_loss_func`, they are kept as they come to its `compute_loss`, and the loss is what `Trainer` makes of
    them. (What a class of somebody's own does on top is left out: it may log or count whenever it is called.)

    Args:
        model: the model that trains.
        n_batches: how many to keep.
        trainer: who trains it; None for a loop without a Trainer.
    """

    def __init__(self, model: nn.Module, n_batches: int, trainer: Trainer | None) -> None:
        self._model = model
        self._calls: deque[Callable[[], Tensor]] = deque(maxlen=n_batches)
        if trainer is not None and (trainer.label_smoother is not None or trainer.compute_loss_func is not None):
            self._stop = self._listen_to(trainer)
        else:
            self._stop = model.register_forward_pre_hook(self._note_forward, with_kwargs=True).remove

    def __len__(self) -> int:
        return len(self._calls)

    def loss(self) -> float:
        """The mean over the batches, in eval mode.

        Raises:
            RuntimeError: if there is no batch, or no loss for it.
        """
        if not self._calls:
            raise RuntimeError(
                f"there is no training batch to try a move of the meshes on: {_KEEP_EVERY_MOVE}, or let the model run "
                "in train mode before one is due."
            )
        with eval_mode(self._model):
            losses = [call().detach().mean() for call in self._calls]
        return float(torch.stack(losses).float().mean())

    def close(self) -> None:
        """Forget the batches, and look at no more of them."""
        self._calls.clear()
        self._stop()

    def _note(self, call: Callable[[], Tensor]) -> None:
        """Keep a batch, in the form of what computes its loss, if it is one of training."""
        if self._model.training and torch.is_grad_enabled():
            self._calls.append(call)

    def _note_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept = dict(kwargs)
        self._note(lambda: _loss_in(model(*args, **kept)))

    def _listen_to(self, trainer: Trainer) -> Callable[[], None]:
        """Note what `trainer.compute_loss` is called with; returns what ends that."""
        inner, was_there = trainer.compute_loss, "compute_loss" in vars(trainer)

        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            kept, n_items = dict(inputs), kwargs.get("num_items_in_batch")  # `inputs` loses its labels on the way
            self._note(lambda: Trainer.compute_loss(trainer, self._model, dict(kept), num_items_in_batch=n_items))
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss  # type: ignore[method-assign]

        def stop() -> None:
            if vars(trainer).get("compute_loss") is not compute_loss:
                return  # somebody has replaced it since
            if was_there:
                trainer.compute_loss = inner  # type: ignore[method-assign]
            else:
                del trainer.compute_loss

        return stop


def _loss_in(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise RuntimeError(
            f"the model returned no loss for a training batch (its output is a {type(output).__name__}), so a move of "
            f"the meshes cannot be tried. Put the labels into the batch, or {_KEEP_EVERY_MOVE}."
        )
    return loss
