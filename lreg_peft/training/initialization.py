"""A start that has seen data: projections along the directions that matter, meshes at quantiles."""

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.checks import choice, whole
from ..core.coordinates import all_finite, leading_axes, principal_axes, standardised_start
from ..core.distributed import (
    gather_objects,
    rank_and_world,
    require_equal,
    sum_over_processes,
    tensor_from_main,
    together,
)
from ..modules import eval_mode, unwrap
from ..output_rows import per_pass
from ..rows import IGNORE_INDEX, BatchData, batches_of, first_batches, loss_of, model_inputs
from ..tuner.config import DATA_STARTS
from ..tuner.hooks.output_head import wrapped_head
from ..tuner.layer import LRegLayer, layers_with_adapter
from ..tuner.layout import first_tensor
from ..tuner.moves import Tentative
from .head_start import HeadRows, HeadStart, find_head
from .label_shift import LabelShift, TokenRows

# Columns of the random matrix that compresses output gradients: so many for each component, and more.
_SKETCH_PER_COMPONENT, _SKETCH_MORE = 4, 16
# So many samples, or labels, run backwards over all processes, in evenly spaced batches: directions need fewer than a
# head does.
_GRADIENT_SAMPLES, _GRADIENT_LABELS = 32, 4096


def initialize_lreg_weights(
    model: nn.Module,
    data: BatchData,
    *,
    method: Literal["pca", "gradient"] | None = None,
    adapter_name: str = "default",
    n_batches: int = 8,
    max_samples: int = 1024,
    seed: int = 0,
    start_head: bool | None = None,
    show_progress: bool = True,
) -> LabelShift | HeadStart | None:
    """Fit projection and mesh of every adapted module to data, in one pass over a few batches.

    The rows of P are directions of the module's real inputs x, scaled so that u = sigmoid(P x + b) is close to
    uniform; the nodes go to the quantiles of u, so that every element is used from the first step. The coefficients
    stay zero, so the function of the model does not change, but for what `start_head` is about.

    - "pca": the principal components of x ("the built-in PCA can be obtained through standard unsupervised methods",
      Li, Cheng & Gu 2025, sec. 2.7).
    - "gradient": the leading right singular vectors of sum g (x - mean x)^T, g the gradient of the loss in the
      module's output: the directions of x along which a change of the output lowers the loss most. The batches need
      labels; 32 samples or 4,096 labels run backwards. (The same matrix steers the start of LoRA-GA; Wang, Yu & Li
      2024.)

    Padding is left out through the `attention_mask` of a batch. With several processes every rank contributes its
    share of the rows and all end with the same tensors.

    Args:
        model: a model with an LReg adapter, in a `PeftModel` or injected.
        data: a data set, or batches as the model takes them, dictionaries of tensors; the first `n_batches` are used.
        method: "pca" or "gradient"; None takes the one that `LRegConfig(init_weights=...)` names, or "pca".
        adapter_name: the adapter to initialise.
        n_batches: batches to run.
        max_samples: rows (tokens, pixels) kept per module, over all processes; memory is this many input rows for
            every adapted module.
        seed: of the choice of rows.
        start_head: None lets a new head, a classifier or a regression in `modules_to_save`, begin at the optimum of
            its last linear layer on the features of the batches (see `head_start`), if they have labels and the loss
            is that of Transformers' tasks. True asks for a start of the output: that one, or for a shortcut on a
            language model's head the shift in how often each token comes, log((n + a) / (q + a)) for n tokens where
            the model expects q. False leaves the output alone. Neither costs a pass. Such a start changes the function
            of the model, so it is tried first: what one half of the data suggests must lower the loss of the other
            half, and the reverse; else the output stays as it was.
        show_progress: show a progress bar on the main process.

    Returns:
        What the start of the output did, with the losses before and after; None where there was none.

    Raises:
        ValueError: if there is no such adapter, it has been trained already, there is nothing for `start_head=True`
            to be about, the batches give no rows, the inputs of a module, their gradients or the labels are not finite,
            no label counts for the method "gradient", or processes differ in model or options. The model is then as
            it was.
        TypeError: if a batch is not a dictionary.
            What one process raises, all raise.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):  # which waits for the others in every forward pass
        model = model.module
    with together():
        whole("n_batches", n_batches, 1)
        whole("max_samples", max_samples, 1)
        whole("seed", seed, 0)
        if method is not None:
            choice("method", method, DATA_STARTS)
        layers = _layers_at_their_start(model, adapter_name)
        if method is None:
            promised = model.peft_config[adapter_name].init_weights  # type: ignore[index,union-attr]
            method = promised if promised in DATA_STARTS else "pca"
        output_rows = None if start_head is False else _output_rows(model, layers, adapter_name, n_batches, start_head)
    options = {"method": method, "adapter_name": adapter_name, "n_batches": n_batches, "max_samples": max_samples}
    options["start_head"] = start_head
    require_equal({**options, "seed": seed}, "Give every process the same options.")

    rank, world = rank_and_world()
    hidden = rank > 0 or not show_progress
    quota = per_pass(max_samples, n_batches)
    with_gradient = method == "gradient"
    collector = _Collector(layers, adapter_name, quota, seed + 7919 * rank, n_batches if with_gradient else 0)
    with together(), collector, output_rows or nullcontext(), eval_mode(model):
        for batch in first_batches(batches_of(data), n_batches, "LReg start: inputs", hidden):
            inputs = model_inputs(model, batch, labels=False)
            collector.attention_mask = inputs.get("attention_mask")
            backwards = collector.wants_gradient(inputs.get("labels"))
            with torch.set_grad_enabled(backwards):
                output = model(**inputs)
            if output_rows is not None:
                output_rows.take(inputs, output)
            if backwards:
                collector.backward(loss_of(output))

    starts = {}
    for name, layer in tqdm(layers.items(), desc="LReg start: meshes", disable=hidden):
        rows = _gather(collector.rows[name], layer.parts(adapter_name)[1].nodes.device, world)
        sketch = None
        if with_gradient:
            (sketch,) = sum_over_processes([collector.sketch(name, rows.mean(dim=0) if len(rows) else None)])
        with together():
            start = _start(name, layer, adapter_name, rows, sketch)
        # The main process's on every process: the same rows need not give the same bits on other hardware.
        starts[name] = tuple(map(tensor_from_main, start))
    owed = [layer for layer in layers.values() if adapter_name in layer.needs_data_init]
    parts = [part for layer in layers.values() for part in layer.parts(adapter_name)]
    try:
        with Tentative(tensor for part in parts for tensor in part.state_dict(keep_vars=True).values()) as trial:
            with together():
                for name, layer in layers.items():
                    layer.set_encoder(adapter_name, *starts[name])
            report = None if output_rows is None else output_rows.start()
            trial.keep()
    except BaseException:
        for layer in owed:
            layer.needs_data_init.add(adapter_name)
        raise
    return report


def _output_rows(
    model: nn.Module, layers: Mapping[str, LRegLayer], adapter_name: str, n_batches: int, start_head: bool | None
) -> TokenRows | HeadRows | None:
    """What sees to the start of the output; None if there is nothing to start."""
    layer = wrapped_head(unwrap(model))
    if layer is not None and layer in layers.values():
        return TokenRows(model, layer, adapter_name, n_batches, is_new=True) if start_head else None
    head = find_head(model, adapter_name)
    if head is None and start_head:
        raise ValueError(
            "start_head=True is about a shortcut on the output head of a language model, or a new head in "
            f"modules_to_save, and {type(unwrap(model)).__name__} has none of this adapter: add the head to "
            "target_modules, or leave start_head out."
        )
    return None if head is None else HeadRows(model, head, n_batches, must_start=bool(start_head))


def _start(
    name: str, layer: LRegLayer, adapter_name: str, rows: Tensor, sketch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection, bias and nodes of one module."""
    if rows.shape[0] < 2:
        raise ValueError(
            f"the batches gave {rows.shape[0]} rows for {name!r}, at least 2 are needed: the data loader is empty, "
            "its attention_mask hides everything, or the forward pass does not reach this module."
        )
    if not all_finite(rows):
        raise ValueError(
            f"the inputs of {name!r} must be finite, got NaN or infinite values in {len(rows)} rows: look for them in "
            "the weights of the model and in the batches, or compute in bfloat16 or float32 instead of float16."
        )
    n_components, n_nodes = layer.parts(adapter_name)[1].nodes.shape
    if sketch is None:
        axes = principal_axes(rows, n_components)
    else:
        if not all_finite(sketch):
            raise ValueError(
                f"the gradients of the loss in the output of {name!r} must be finite, got NaN or infinite values: look "
                "at the loss of the batches, or use method='pca'."
            )
        if not sketch.any():
            raise ValueError(
                f"the loss has no gradient in the output of {name!r}, so there are no directions to take from it: all "
                "labels of the batches are ignored (-100), or this module does not reach the loss. Give batches with "
                "labels that count, or use method='pca'."
            )
        axes = leading_axes(sketch.to(rows.dtype), n_components)
    try:
        return standardised_start(rows, axes, n_components, n_nodes)
    except (ValueError, RuntimeError) as error:  # of linear algebra, too
        raise ValueError(f"there is no start for {name!r}: {error}") from error


def _layers_at_their_start(model: nn.Module, adapter_name: str) -> dict[str, LRegLayer]:
    layers = layers_with_adapter(model, adapter_name)
    trained = [name for name, layer in layers.items() if not layer.is_identity(adapter_name)]
    if trained:
        raise ValueError(
            f"the adapter {adapter_name!r} is not at its start: {trained[0]!r} has non-zero coefficients, which a new "
            "projection would give another meaning. Initialise before training, and not with init_weights=False."
        )
    return layers


class _Collector(ExitStack):
    """Keeps a random share of the input rows of every layer, and a sketch of what the gradients of some ask for.

    While it is open the shortcuts of the adapter, which are zero, are left out of the passes.
    """

    def __init__(
        self, layers: dict[str, LRegLayer], adapter_name: str, quota: int, seed: int, n_with_gradient: int
    ) -> None:
        super().__init__()
        self.rows: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.attention_mask: Tensor | None = None
        self._layers, self._adapter_name = layers, adapter_name
        self._quota = quota
        self._generator = torch.Generator().manual_seed(seed)
        self._n_with_gradient = n_with_gradient  # batches, of which some run backwards
        self._n_labelled = 0
        # Zero, added to the output of frozen modules so that a loss has a gradient in it.
        device = next(iter(layers.values())).parts(adapter_name)[0].weight.device
        self._zero = torch.zeros((), device=device, requires_grad=True)
        # Per layer sum of (S^T g) x^T and of S^T g, S a random matrix that every process draws alike.
        self._products: dict[str, tuple[Tensor, Tensor]] = {}
        self._compress: dict[str, Tensor] = {}

    def __enter__(self) -> "_Collector":
        for name, layer in self._layers.items():
            self.callback(setattr, layer, "_active_adapter", layer._active_adapter)
            layer._active_adapter = [other for other in layer.active_stack if other != self._adapter_name]
            self.callback(layer.register_input_hook(partial(self._keep, name), self._adapter_name))
            if self._n_with_gradient:
                self.callback(layer.register_forward_hook(self._add_zero).remove)
                self.callback(layer.register_gradient_hook(partial(self._multiply, name), self._adapter_name))
        return self

    def wants_gradient(self, labels: Any) -> bool:
        """Whether the next batch, with these labels, is to run backwards."""
        if not self._n_with_gradient:
            return False
        counts = (1, 1)
        if isinstance(labels, Tensor) and labels.ndim:
            counts = (len(labels), labels.numel())
            if not labels.is_floating_point() and labels.eq(IGNORE_INDEX).all():  # the mean over no label is NaN
                return False
        enough = zip((_GRADIENT_SAMPLES, _GRADIENT_LABELS), counts, strict=True)
        wanted = min(-(-most // (max(n, 1) * rank_and_world()[1])) for most, n in enough)
        self._n_labelled += 1
        return (self._n_labelled - 1) % max(1, self._n_with_gradient // wanted) == 0

    def backward(self, loss: Any) -> None:
        """Send the gradient of the loss through the model, without touching any `.grad`."""
        if loss is None:
            raise ValueError(
                "the method 'gradient' needs a loss, and the model returned none: give batches with labels, or use "
                "'pca'."
            )
        if not torch.isfinite(loss).all():
            raise ValueError(f"the loss of the batches must be finite, got {float(loss.detach())}.")
        if loss.requires_grad:
            torch.autograd.grad(loss, [self._zero], allow_unused=True)

    def _add_zero(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden, rebuild = first_tensor(output)
        wants = torch.is_grad_enabled() and not hidden.requires_grad
        return rebuild(hidden + self._zero.to(hidden)) if wants else output

    def _keep(self, name: str, features: Tensor) -> None:
        """Keep some rows of `[..., in_features]`."""
        rows = features.detach().reshape(-1, features.shape[-1])
        mask = self.attention_mask
        if mask is not None and mask.ndim == 2 and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).to(rows.device).bool()]
        chosen = torch.randperm(rows.shape[0], generator=self._generator, device="cpu")[: self._quota]
        self.rows[name].append(self._layers[name].encoder_input(self._adapter_name, rows[chosen.to(rows.device)]))

    @torch.no_grad()
    def _multiply(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Add one backward pass to the sketch, from encoder inputs and gradients `[..., width]` in the same positions;
        padding has no gradient."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        g = gradient.reshape(-1, gradient.shape[-1]).float()
        if name not in self._compress:
            draw = torch.Generator().manual_seed(0)
            matrix = torch.randn(g.shape[1], self._sketch_size(name), generator=draw, device="cpu")
            self._compress[name] = matrix.to(g.device)
        small = g @ self._compress[name]  # [rows, sketch]
        product, total = self._products.get(name, (0, 0))
        self._products[name] = (product + small.T @ x, total + small.sum(dim=0))

    def sketch(self, name: str, mean: Tensor | None) -> Tensor:
        """sum (S^T g) (x - mean)^T: `[sketch, in_features]`, whose row space is that of the full matrix up to S.

        Zero for a process that saw no gradients; `mean` is None if no process saw rows.
        """
        if mean is None or name not in self._products:
            weight = self._layers[name].parts(self._adapter_name)[0].weight
            return torch.zeros(self._sketch_size(name), weight.shape[1], device=weight.device)
        product, total = self._products[name]
        return product - torch.outer(total, mean.to(total))

    def _sketch_size(self, name: str) -> int:
        layer = self._layers[name]
        n_components = len(layer.parts(self._adapter_name)[0].weight)
        return min(_SKETCH_PER_COMPONENT * n_components + _SKETCH_MORE, layer.out_features)


def _gather(rows: list[Tensor], device: torch.device, world: int) -> Tensor:
    """Rows of all processes in the order of their ranks: `[n, in_features]`, fp32 or fp64; all get the same."""
    own = torch.cat(rows) if rows else torch.empty(0, 0, device=device)
    own = own if own.dtype == torch.float64 else own.float()
    if world == 1:
        return own
    parts = [part for part in gather_objects(own.cpu()) if part.shape[0]]
    return torch.cat(parts).to(own.device) if parts else own
