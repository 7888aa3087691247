"""After training: the output shortcut made to expect every label as often as it comes."""

from itertools import islice

from torch import nn
from tqdm.auto import tqdm

from ..core.checks import whole
from ..core.distributed import rank_and_world, require_equal, together
from ..core.fingerprint import is_sharded
from ..modules import unwrap
from ..rows import BatchData, batches_of
from ..tuner.hooks import reminder
from ..tuner.hooks.output_head import wrapped_head
from ..tuner.layer import LRegLayer
from ..tuner.moves import Tentative
from .label_shift import LabelShift, ShiftedHead, shift_labels


def match_token_frequencies(
    model: nn.Module,
    data: BatchData,
    *,
    adapter_name: str | None = None,
    n_batches: int = 32,
    show_progress: bool = True,
) -> LabelShift:
    """Make a trained language model expect every token as often as it comes, in one forward pass over some batches.

    A short training leaves the expected frequencies of most tokens where an optimiser with equal steps for all of them
    got to. What is missing has a closed form: n times a token comes in the batches where the model expects q, and
    log((n + a) / (q + a)) goes into the shortcut on the output head, along the direction in which this is closest to
    a constant. That is the step of `initialize_lreg_weights(..., start_head=True)`, from where the model is now.
    The shift that one half of the batches suggests is tried on the other half, and the reverse: the a that lowers these
    losses most is taken, and if none lowers them the model stays as it was.

    Parameters and cost of the model stay what they are. Call it when training is over, with batches it was trained on:

        trainer.train()
        lreg_peft.match_token_frequencies(model, trainer.get_train_dataloader())

    Args:
        model: a language model with an active LReg adapter that has a shortcut on the output head.
        data: a data set, or batches as the model takes them, dictionaries with labels, of which every process gives
            its own share; only the first `n_batches` are read.
        adapter_name: which adapter; None takes the active one.
        n_batches: batches to run, of each process. The gain grows with the labels in them.
        show_progress: show a progress bar on the main process.

    Returns:
        What was done, with the losses before and after.

    Raises:
        ValueError: if the model has no shortcut of an active adapter on its output head, is sharded (FSDP: load the
            saved adapter into a whole model first), or changes the logits behind the head; if its loss is not the mean
            cross-entropy of the logits; if no label counts; and if processes differ in model or options. The model is
            then as it was.
        TypeError: if a batch is not a dictionary.
            What one process raises, all raise.

    Warns:
        UserWarning: if the start from data that the configuration promises has not been made.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):  # which waits for the others in every forward pass
        model = model.module
    with together():
        whole("n_batches", n_batches, 1)
        layer, adapter_name = _head(model, adapter_name)
        found = batches_of(data)
    options = {"adapter_name": adapter_name, "n_batches": n_batches}
    require_equal(
        {**options, **layer.state_of(adapter_name)}, "Give every process the same options, and load the same adapter."
    )
    if adapter_name in layer.needs_data_init:
        reminder.warn("the calibration", "projection and mesh are random and uniform", stacklevel=3)
    rank, _ = rank_and_world()
    batches = tqdm(
        islice(found, n_batches),
        total=n_batches,
        desc="LReg calibration",
        disable=not (show_progress and rank == 0),
    )
    head = ShiftedHead(model, layer, adapter_name, "a calibration of the output", "do without match_token_frequencies")
    with Tentative([layer.parts(adapter_name)[2].weight]) as trial:
        report = shift_labels(head, batches, n_batches)
        trial.keep()
    return report


def _head(model: nn.Module, adapter_name: str | None) -> tuple[LRegLayer, str]:
    """The output head and the adapter on it."""
    inner = unwrap(model)
    layer = wrapped_head(inner)
    if layer is None:
        raise ValueError(
            "match_token_frequencies is about a shortcut on the output head of a language model, and "
            f"{type(inner).__name__} has none: add the head to target_modules and train it there."
        )
    if is_sharded(inner):
        raise ValueError(
            "match_token_frequencies needs whole parameters, and those of this model are sharded: save the adapter, "
            "load it into a model that is not, and calibrate that."
        )
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lreg_encoder]
    if adapter_name is None and len(active) == 1:
        return layer, active[0]
    if adapter_name is None or adapter_name not in active:
        raise ValueError(
            f"adapter_name must be one of the active adapters on the output head, {active}, got {adapter_name!r}: "
            "activate it with set_adapter."
        )
    return layer, adapter_name
