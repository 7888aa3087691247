"""A start that has seen data: projections along the principal components of the real inputs, meshes at quantiles."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .core.projection import principal_start
from .layer import LRegLayer


def initialize_lreg_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    n_batches: int = 8,
    max_samples: int = 4096,
    seed: int = 0,
    show_progress: bool = True,
) -> None:
    """Fit projection and mesh of every adapted module to its real inputs, in one pass over a few batches.

    For each module: P and b standardise the leading principal components of the inputs and scale them so that
    u = sigmoid(P x + b) is close to uniform; the nodes go to the quantiles of u, so that every element is used from
    the first step. The coefficients stay zero, so the function of the model does not change.

    Padding is left out through the `attention_mask` of a batch. With several processes every rank contributes its
    share of the rows and all end with the same tensors.

    Args:
        model: a model with an LReg adapter, in a `PeftModel` or injected.
        dataloader: batches as the model takes them, dictionaries of tensors; only the first `n_batches` are used.
        adapter_name: the adapter to initialise.
        n_batches: batches to run forward.
        max_samples: rows (tokens, pixels) kept per module, over all processes; memory is this many input rows for
            every adapted module.
        seed: of the choice of rows.
        show_progress: show a progress bar on the main process.

    Raises:
        ValueError: if there is no such adapter, it has been trained already, or the batches give no rows.
        TypeError: if a batch is not a dictionary.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LRegLayer) and adapter_name in module.lreg_nodes
    }
    if not layers:
        raise ValueError(
            f"the model has no LReg adapter called {adapter_name!r}: call get_peft_model(model, LRegConfig(...)) first."
        )
    trained = [name for name, layer in layers.items() if not layer.is_identity(adapter_name)]
    if trained:
        raise ValueError(
            f"the adapter {adapter_name!r} is not at its start: {trained[0]!r} has non-zero coefficients, which a new "
            "projection would give another meaning. Initialise before training, with init_weights=True or 'pca'."
        )
    for name in ("n_batches", "max_samples"):
        if (value := locals()[name]) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")

    rank, world = _rank_and_world()
    collector = _RowCollector(layers, quota=-(-max_samples // (n_batches * world)), seed=seed + 7919 * rank)
    main = rank == 0 and show_progress
    with collector, _in_eval(model), torch.no_grad():
        batches = islice(dataloader, n_batches)
        for batch in tqdm(batches, total=n_batches, desc="LReg start: inputs", disable=not main):
            if not isinstance(batch, Mapping):
                raise TypeError(f"a batch must be a dictionary of model inputs, got {type(batch).__name__}.")
            collector.attention_mask = batch.get("attention_mask")
            device = next(model.parameters()).device
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})

    for name, layer in tqdm(layers.items(), desc="LReg start: meshes", disable=not main):
        rows = _gather(collector.rows[name], world)
        if rows.shape[0] < 2:
            raise ValueError(
                f"the batches gave {rows.shape[0]} rows for {name!r}, at least 2 are needed: the dataloader is empty, "
                "its attention_mask hides everything, or the forward pass does not reach this module."
            )
        nodes = layer.lreg_nodes[adapter_name]
        start = principal_start(rows, nodes.shape[0], nodes.shape[1])
        layer.set_encoder(adapter_name, *_from_main(start, world))


class _RowCollector(ExitStack):
    """Keeps a random share of the input rows of every layer while the model runs forward."""

    def __init__(self, layers: dict[str, LRegLayer], quota: int, seed: int) -> None:
        super().__init__()
        self.rows: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.attention_mask: Tensor | None = None
        self._layers = layers
        self._quota = quota
        self._generator = torch.Generator().manual_seed(seed)

    def __enter__(self) -> "_RowCollector":
        for name, layer in self._layers.items():
            self.callback(layer.register_input_hook(partial(self._keep, name)))
        return self

    def _keep(self, name: str, features: Tensor) -> None:
        """Keep some rows of `[..., in_features]`."""
        rows = features.reshape(-1, features.shape[-1])
        mask = self.attention_mask
        if mask is not None and mask.ndim == 2 and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).to(rows.device).bool()]
        chosen = torch.randperm(rows.shape[0], generator=self._generator)[: self._quota]
        self.rows[name].append(rows[chosen.to(rows.device)].detach())


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of a block; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gather(rows: list[Tensor], world: int) -> Tensor:
    """Rows of all processes in the order of their ranks: `[n, in_features]`, fp32 or fp64."""
    own = torch.cat(rows) if rows else torch.empty(0, 0)
    own = own if own.dtype == torch.float64 else own.float()
    if world == 1:
        return own
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own.cpu())
    parts = [part for part in parts if part.shape[0]]
    return torch.cat(parts).to(own.device) if parts else own


def _from_main(tensors: tuple[Tensor, ...], world: int) -> tuple[Tensor, ...]:
    """The main process's tensors on every process: the same rows need not give the same bits on other hardware."""
    if world == 1:
        return tensors
    box = [tuple(tensor.cpu() for tensor in tensors)]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def install_reminder(model: nn.Module) -> None:
    """Warn if training begins before the data-driven start that a configuration promised."""
    remove_reminder(model)
    model.register_forward_pre_hook(_remind)


def remove_reminder(model: nn.Module) -> None:
    """Undo `install_reminder`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _remind:
            del model._forward_pre_hooks[key]


def _remind(model: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    owing = [module for module in model.modules() if isinstance(module, LRegLayer) and module.start_is_owed]
    if not any(module.training for module in owing):
        return
    for module in owing:
        module.start_is_owed.clear()
    warnings.warn(
        "LRegConfig(init_weights='pca') asks for a start from data, but initialize_lreg_weights(model, dataloader) was "
        "not called before training: the adapter starts from a random projection and uniform meshes.",
        UserWarning,
        stacklevel=2,
    )
