"""Logits that are computed when somebody needs them.

A training step of a language model needs the loss and not the logits. `DeferredLogits` is a tensor of their shape,
dtype and place in the autograd graph that holds no numbers. A model goes on with it as with any tensor: casts, views
and slices of rows stay deferred, a plain cross-entropy is handed to the fused loss, and whatever else is done with it
computes the numbers first. So the loss is always the one that the model computes, whatever that is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

_ADVICE = "LRegConfig(fused_loss=False) makes the model compute its logits in the forward pass."


class LogitsSource(Protocol):
    """Where deferred logits `[n, classes]` come from.

    Attributes:
        features: `[n, in_features]`, what they are a function of, in its graph.
        weights: those that they were differentiable in as well, whether or not they require a gradient by now.
        n_classes: outputs per row.
        dtype: of the logits.
    """

    features: Tensor
    weights: tuple[Tensor, ...]
    n_classes: int
    dtype: torch.dtype

    def values(self) -> Tensor:
        """`[n, classes]` as of the forward pass, whatever has changed since; without a graph."""

    def with_graph(self, features: Tensor) -> Tensor:
        """The same with a graph down to `features`, which stand for its own, and to its weights.

        Raises:
            RuntimeError: if the weights are not those of the forward pass any more.
        """

    def loss(self, rows: Tensor, targets: Tensor, normaliser: float | None, smoothing: float) -> Tensor | None:
        """Summed cross-entropy of some rows over `normaliser`, differentiable; None takes their number.

        None if it would not be that of the forward pass any more, in its value or its gradients.
        """


class _State:
    """What the deferred tensors of one forward pass share."""

    def __init__(self, source: LogitsSource) -> None:
        self.source = source
        #: Whether a loss has been computed past the tensors.
        self.fused = False
        #: Whether all of these were the mean over rows without further options.
        self.is_plain = True
        #: Whether somebody watches the gradient of one of them.
        self.watched = False
        self._values: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None  # features cut off from theirs, logits

    def values(self) -> Tensor:
        if self._values is None:
            with torch.no_grad():
                self._values = self.source.values()
        return self._values

    def hand_over_values(self) -> None:
        """Whoever has the values may write into them."""
        self._values = None

    def remember_graph(self) -> None:
        """Build the graph now, as the forward pass would have; not if the weights have moved on."""
        if self._graph is None and self._values is None:
            try:
                self._graph = self.graph(self.source.features)
            except RuntimeError:  # the values of then can still be had; a backward pass will say what is wrong
                return
            self._values = self._graph[1].detach()

    def graph(self, features: Tensor, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """Features and logits with a graph between them; `differentiable` keeps that of the features as well."""
        if self._graph is not None and not differentiable:
            return self._graph
        if not differentiable:
            features = features.detach().requires_grad_(features.requires_grad)
        with torch.enable_grad(), _requiring_gradients(self.source.weights):
            return features, self.source.with_graph(features)


class DeferredLogits(Tensor):
    """A tensor `[..., classes]` whose numbers are computed on demand; made by `defer`."""

    _state: _State
    _rows: Tensor
    _is_part: bool
    _has_parts: bool
    _real: Tensor | None

    @staticmethod
    def __new__(cls, state: _State, rows: Tensor, dtype: torch.dtype, is_view: bool) -> "DeferredLogits":  # noqa: D102
        shape = (*rows.shape, state.source.n_classes)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)  # type: ignore[attr-defined]
        self._state, self._rows, self._is_part = state, rows, is_view
        self._has_parts, self._real = False, None
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], DeferredLogits) else None
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _WATCHING and first is not None:
            return _watch(first, func, args, kwargs)
        if first is not None and first._real is None and (handle := _DEFERRED.get(func)) is not None:
            result = handle(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is torch.autograd.grad:
            _refuse_gradient(args, kwargs)
        if _writes(func) and first is not None:
            first._real = _writable(first)
            result = func(first._real, *_all_real(args[1:]), **_all_real(kwargs))
            return first if result is first._real else result
        if isinstance(kwargs.get("out"), DeferredLogits):
            raise RuntimeError(f"logits that are computed on demand cannot be written to. {_ADVICE}")
        return func(*_all_real(args), **_all_real(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what goes past `__torch_function__`: below autograd, which knows the tensor and needs no help."""
        written = (a for a, info in zip(args, func._schema.arguments, strict=False) if info.is_write)
        if any(isinstance(argument, DeferredLogits) for argument in written):
            raise RuntimeError(f"logits that are computed on demand cannot be written to. {_ADVICE}")
        plain = tree_map_only(DeferredLogits, _numbers, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def defer(source: LogitsSource, shape: tuple[int, ...]) -> DeferredLogits:
    """Logits of `source` as a deferred tensor `[*shape, classes]`; the product of `shape` is the number of rows."""
    rows = torch.arange(len(source.features), device=source.features.device).view(shape)
    return _place(_State(source), rows, source.dtype, is_view=False)


def _place(state: _State, rows: Tensor, dtype: torch.dtype, *, is_view: bool) -> DeferredLogits:
    source = state.source
    with _requiring_gradients(source.weights):
        return _Defer.apply(state, rows, dtype, is_view, source.features, *source.weights)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have leaves require gradients that did so once: the adapter may be switched off by now."""
    idle = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in idle:
        tensor.requires_grad_()
    try:
        yield
    finally:
        for tensor in idle:
            tensor.requires_grad_(False)


def is_mean_cross_entropy(logits: Tensor) -> bool:
    """Whether nothing but mean cross-entropies were computed from deferred logits, and at least one."""
    if not isinstance(logits, DeferredLogits):
        return False
    state = logits._state
    untouched = state._values is None and state._graph is None and logits._real is None
    return state.fused and state.is_plain and untouched


def _numbers(logits: DeferredLogits) -> Tensor:
    """The numbers alone, a plain tensor without a graph."""
    if logits._real is not None:
        return logits._real.detach()
    return _pick(logits._state.values(), logits._rows, logits.dtype)


def _pick(values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `[n, classes]`, as `[*rows.shape, classes]`."""
    if rows.numel() != len(values) or not torch.equal(rows.flatten(), torch.arange(len(values), device=rows.device)):
        values = values[rows.flatten()]
    return values.view(*rows.shape, values.shape[-1]).to(dtype)


def real(logits: DeferredLogits) -> Tensor:
    """The plain tensor that the logits would have been, in the graph where gradients are enabled."""
    if logits._real is None:
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return _numbers(logits)
        logits._state.remember_graph()
        logits._real = _Compute.apply(logits)  # type: ignore[no-untyped-call]
    assert logits._real is not None
    return logits._real


def _all_real(tree: Any) -> Any:
    return tree_map_only(DeferredLogits, real, tree)


class _Defer(torch.autograd.Function):
    """Gives deferred logits their place in the graph."""

    @staticmethod
    def forward(
        ctx: Any, state: _State, rows: Tensor, dtype: torch.dtype, is_view: bool, *inputs: Tensor
    ) -> DeferredLogits:
        ctx.state, ctx.rows, ctx.dtype = state, rows, dtype
        ctx.save_for_backward(*inputs)
        return DeferredLogits(state, rows, dtype, is_view)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        create_graph = torch.is_grad_enabled()
        features, *weights = ctx.saved_tensors  # complains of weights that have changed
        features, logits = ctx.state.graph(features, differentiable=create_graph)
        inputs = (features, *weights)
        with torch.enable_grad():
            logits = _pick(logits, ctx.rows, ctx.dtype)
        needed = [t for t in inputs if t.requires_grad]
        if not needed:  # nobody waits for a gradient any more
            return (None,) * (4 + len(inputs))
        found = iter(
            torch.autograd.grad(
                logits, needed, gradient, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        )
        return (None, None, None, None, *(next(found) if t.requires_grad else None for t in inputs))


class _Compute(torch.autograd.Function):
    """From deferred logits to a plain tensor."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        values = logits._state.values()
        numbers = _pick(values, logits._rows, logits.dtype)
        if numbers.data_ptr() == values.data_ptr():
            logits._state.hand_over_values()
        return numbers.new_empty(0).set_(numbers)  # type: ignore[call-overload,no-any-return]  # no view: it can be written to

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


# What stays deferred


def _derive(logits: DeferredLogits, rows: Tensor, dtype: torch.dtype, *, is_view: bool) -> DeferredLogits:
    logits._has_parts |= is_view
    state = logits._state
    if torch.is_grad_enabled() and logits.requires_grad:
        return _place(state, rows, dtype, is_view=is_view)
    return DeferredLogits(state, rows, dtype, is_view)


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> Any:
    if dtype == logits.dtype:
        return logits
    if not dtype.is_floating_point or dtype.itemsize < logits.dtype.itemsize:
        return NotImplemented  # rounding is part of what the model does
    return _derive(logits, logits._rows, dtype, is_view=False)


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    elif kwargs.get("copy") or kwargs.get("memory_format") is not None or "other" in kwargs:
        return NotImplemented
    else:
        kwargs = {name: kwargs[name] for name in ("device", "dtype", "non_blocking") if name in kwargs}
        if len(args) > 3:
            return NotImplemented
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and torch.empty(0, device=device).device != logits.device:
        return NotImplemented
    return _cast(logits, dtype or logits.dtype)


def _view(logits: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    *rows, last = shape
    if last == -1:
        total = 1
        for size in rows:
            total *= size
        last = logits.shape[-1] if total == logits._rows.numel() else 0
    if last != logits.shape[-1] or not rows:
        return NotImplemented
    return _derive(logits, logits._rows.reshape(rows), logits.dtype, is_view=True)


def _reshape(logits: DeferredLogits, *shape: Any, **kwargs: Any) -> Any:
    return _view(logits, *shape, *([kwargs["shape"]] if "shape" in kwargs else []))


def _flatten(logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    end = end_dim % logits.ndim
    if end == logits.ndim - 1:
        return NotImplemented
    return _derive(logits, logits._rows.flatten(start_dim % logits.ndim, end), logits.dtype, is_view=True)


def _getitem(logits: DeferredLogits, key: Any) -> Any:
    keys = key if isinstance(key, tuple) else (key,)
    depth = logits._rows.ndim
    if all(isinstance(k, slice) or k is Ellipsis for k in keys):
        # On one entry per class without memory: rows are picked if the last dimension comes out untouched.
        entries = logits._rows.unsqueeze(-1).expand(logits.shape)[key]
        if entries.ndim == 0 or entries.shape[-1] != logits.shape[-1] or entries.stride(-1) != 0:
            return NotImplemented
        return _derive(logits, entries[..., 0], logits.dtype, is_view=True)
    used = sum(k.ndim if isinstance(k, Tensor) and k.dtype == torch.bool else 1 for k in keys)
    if used > depth or not all(isinstance(k, (slice, int, Tensor)) and not isinstance(k, bool) for k in keys):
        return NotImplemented
    if any(isinstance(k, Tensor) and k.dtype.is_floating_point for k in keys):
        return NotImplemented
    is_view = not any(isinstance(k, Tensor) for k in keys)
    return _derive(logits, logits._rows[key], logits.dtype, is_view=is_view)


def _copy(logits: DeferredLogits, **kwargs: Any) -> Any:
    if kwargs.get("memory_format", torch.contiguous_format) not in (torch.contiguous_format, torch.preserve_format):
        return NotImplemented
    return _derive(logits, logits._rows, logits.dtype, is_view=False)


def _contiguous(logits: DeferredLogits, **kwargs: Any) -> Any:
    return logits if not logits._is_part else _copy(logits, **kwargs)


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or logits._state.watched or type(target) is not Tensor or target.dtype != torch.int64:
        return NotImplemented
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.device != logits.device:
        return NotImplemented
    counts = target != ignore_index
    loss = logits._state.source.loss(
        logits._rows[counts], target[counts], 1.0 if reduction == "sum" else None, label_smoothing
    )
    if loss is None:
        return NotImplemented
    logits._state.fused = True
    logits._state.is_plain &= ignore_index == -100 and reduction == "mean" and not label_smoothing
    # Autocast computes cross-entropy in single precision; without it the loss has the dtype of the logits.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


_DEFERRED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.float: lambda t: _cast(t, torch.float32),
    Tensor.double: lambda t: _cast(t, torch.float64),
    Tensor.half: lambda t: _cast(t, torch.float16),
    Tensor.bfloat16: lambda t: _cast(t, torch.bfloat16),
    Tensor.to: _to,
    Tensor.view: _view,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _getitem,
    Tensor.contiguous: _contiguous,
    Tensor.clone: _copy,
    torch.clone: _copy,
}

_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "output_nr", "names",
    "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn",
    "retains_grad", "_version", "_backward_hooks", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "get_device", "__len__", "__hash__",
    "storage_offset",
)  # fmt: skip
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}

# Gradients of logits


_WATCHING = {Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_}


def _watch(logits: DeferredLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.register_hook and _only_counts(args[1]):
        pass
    elif logits._state.fused and func is not Tensor.requires_grad_:
        raise RuntimeError(f"the loss was computed without logits, so that it sends them no gradient. {_ADVICE}")
    else:
        logits._state.watched |= func is not Tensor.requires_grad_ or not logits.requires_grad
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _only_counts(hook: Any) -> bool:
    """Whether a hook is one by which torch's counters (of FLOPs, of memory) note where the backward pass is."""
    cells = getattr(hook, "__closure__", None) or ()
    functions = (hook, *(cell.cell_contents for cell in cells if callable(cell.cell_contents)))
    return any(getattr(function, "__module__", None) == "torch.utils.module_tracker" for function in functions)


def _refuse_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    if any(
        isinstance(t, DeferredLogits) and t._state.fused for t in ([inputs] if isinstance(inputs, Tensor) else inputs)
    ):
        raise RuntimeError(f"the loss was computed without logits, so that it has no gradient in them. {_ADVICE}")


# Writing into logits

_READS = {"__index__", "__int__", "__invert__", "__iter__", "__init__"}
_IN_PLACE = {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__"))
    or (name.startswith("__i") and name.endswith("__") and name not in _READS)
    or name == "__setitem__"
} | {Tensor.data.__set__, Tensor.grad.__set__}  # type: ignore[attr-defined,union-attr]


def _writes(func: Callable[..., Any]) -> bool:
    return func in _IN_PLACE


def _writable(logits: DeferredLogits) -> Tensor:
    """The tensor that stands for the logits from now on."""
    if logits._real is None:
        if logits._is_part or logits._has_parts:
            raise RuntimeError(f"a view of logits that are computed on demand cannot be written to. {_ADVICE}")
        values = real(logits)
        return values if logits._real is not None else values.clone()
    return logits._real
