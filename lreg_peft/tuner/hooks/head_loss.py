"""The fused language-model loss inside a model, without a change to the training loop.

While a model with a shortcut on its output head trains and gets labels, its head returns logits that are computed on
demand. What the model does with them is left to the model: where it takes their plain cross-entropy, that is computed
in chunks from the rows that have a label, and no tensor of the size of the logits exists; whatever else it does gets
the logits themselves. `LRegConfig(fused_loss=False)` switches all of it off.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ...core.basis import under_transform
from ...core.deferred import defer
from ...core.fused_loss import is_plain_linear
from ...modules import has_hooks, is_compiling, remove_hooks
from ..layer import LRegLayer
from ..layout import first_tensor
from .output_head import wrapped_head
from .registry import remember

# Of the last head that was looked at, with what the verdict depends on.
_VERDICT = "_lreg_works_on_rows"
_STALE = (
    "the logits of a training step are computed on demand, and {} since then. Read them before, or set "
    "LRegConfig(fused_loss=False)."
)


def install(model: nn.Module) -> None:
    """Let the output head of `model` compute the training loss, if it is one that can; may be called again."""
    if isinstance(model, PreTrainedModel) and _begin not in model._forward_pre_hooks.values():
        remember(model, release)
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_finish, always_call=True)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    remove_hooks(model, _begin, _finish)


def _begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: tell the head whether logits may wait. What a broken-off pass has left is overwritten."""
    head = wrapped_head(model)
    if head is not None and head.in_thread.loss_request in (None, defer_logits):  # others' are not ours to change
        wanted = kwargs.get("labels") is not None and head.training and torch.is_grad_enabled()
        wanted = wanted and not is_compiling() and asks_for_fused_loss(model, head)
        head.in_thread.loss_request = defer_logits if wanted else None


def _finish(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, also after an error."""
    head = wrapped_head(model)
    if head is not None and head.in_thread.loss_request is defer_logits:
        head.in_thread.loss_request = None


def asks_for_fused_loss(model: nn.Module, head: LRegLayer) -> bool:
    """Whether the active adapters of a head ask for it."""
    if head.disable_adapters or head.batch_adapter_names is not None:
        return False
    configs = getattr(model, "peft_config", {})
    adapters = head.stacked_adapters
    return bool(adapters) and all(getattr(configs.get(name), "fused_loss", False) for name in adapters)


def defer_logits(head: LRegLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Logits of `head` that are computed on demand; None if it must compute them now."""
    if is_compiling() or torch.jit.is_tracing() or under_transform():  # type: ignore[no-untyped-call]
        return None
    features = args[0] if len(args) == 1 and not kwargs else None
    if type(features) is not Tensor or features.ndim < 2 or features.shape[-1] != head.in_features:
        return None
    if head.out_features < 2 or not features.is_floating_point() or has_hooks(head, within=False) or _watches_all():
        return None
    if head.source is not None or head.has_dropout or _keeps_watch_on_saved_tensors():
        return None  # other features, another mask at every call, other tensors than those of a repeated pass
    if any(weight._backward_hooks for weight in head.parameters()):
        return None  # a gradient taken on demand passes by them, and then they act once more where it is accumulated
    dtype = _dtype_of_rows(head, features)
    if dtype is None:
        return None
    return defer(_HeadLogits(head, features.reshape(-1, features.shape[-1]), dtype), tuple(features.shape[:-1]))


def _keeps_watch_on_saved_tensors() -> bool:
    """Whether somebody, such as a checkpoint, has hooks on what is saved for the backward pass."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _watches_all() -> bool:
    """Whether somebody has hooks on every module; those of torch's own counters and trackers change nothing."""
    tables = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return any(
        not str(getattr(hook, "__module__", "")).startswith("torch.") for table in tables for hook in table.values()
    )


def _dtype_of_rows(head: LRegLayer, features: Tensor) -> torch.dtype | None:
    """The dtype of the logits, if the wrapped module is a frozen function of every row by itself; None otherwise."""
    base = head.base_layer
    tensors = [*base.parameters(), *base.buffers()]
    if not tensors or has_hooks(base, within=True):
        return None
    for tensor in tensors:
        # Quantised, sharded and off-loaded weights are other tensors.
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.requires_grad or tensor.device != features.device:
            return None
    kind = features.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if is_plain_linear(base):
        dtypes = {_cast_by(autocast, t) for t in (features, base.weight, base.bias) if t is not None}
        fits = base.weight.shape == (head.out_features, head.in_features)
        return dtypes.pop() if fits and len(dtypes) == 1 else None
    key = (
        features.dtype,
        autocast,
        *((id(m), id(m.__dict__.get("forward")), id(type(m).forward), m.training) for m in base.modules()),
    )
    known = head.__dict__.get(_VERDICT)
    if known is None or known[0] != key:
        known = head.__dict__[_VERDICT] = (key, _try_rows(head, features))
    return known[1]  # type: ignore[no-any-return]


def _cast_by(autocast: torch.dtype | None, tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes a tensor: autocast leaves doubles alone."""
    changes = autocast is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return autocast if changes else tensor.dtype  # type: ignore[return-value]


def _try_rows(head: LRegLayer, features: Tensor) -> torch.dtype | None:
    """As `_dtype_of_rows`, by trying it on a few rows of random numbers; nothing is left behind."""
    base = head.base_layer
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2, 3, head.in_features, generator=generator, device="cpu").to(features)
    kept = [buffer.clone() for buffer in base.buffers()]
    devices = [features.device] if features.device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=features.device.type if devices else "cuda"):
        try:
            whole = base(block)
            rows = block.flatten(0, 1)
            others = [base(rows), base(rows[:2]), base(rows[2:])]
        except Exception:  # whatever a foreign module does not like about rows
            return None
        finally:
            changed = any(not torch.equal(now, before) for now, before in zip(base.buffers(), kept, strict=True))
            with torch.no_grad():
                for now, before in zip(base.buffers(), kept, strict=True):
                    now.copy_(before)
    if changed or any(type(output) is not Tensor or output.requires_grad for output in (whole, *others)):
        return None
    if whole.shape != (2, 3, head.out_features) or not whole.is_floating_point():
        return None
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(
        whole.dtype, 2e-2
    )  # rounding in products of other shapes
    expected = whole.flatten(0, 1)
    same = (
        torch.allclose(found, expected, rtol=tolerance, atol=tolerance) for found in (others[0], torch.cat(others[1:]))
    )
    return whole.dtype if all(same) else None


class _HeadLogits:
    """The logits of one forward pass, as `core.deferred.LogitsSource` has them."""

    def __init__(self, head: LRegLayer, features: Tensor, dtype: torch.dtype) -> None:
        self.features, self.n_classes, self.dtype = features, head.out_features, dtype
        self._head, self._base = head, head.base_layer
        self._adapters, self._mode = head.stacked_adapters, _mode(head)
        # Tensors of this pass: later the layer may hold others, or hold them for the time of the pass only.
        self._own = _own_tensors(head)
        self._trains = {name: tensor.requires_grad for name, tensor in self._own.items()}
        self.weights = tuple(tensor for tensor in self._own.values() if tensor.requires_grad)
        # Small beside the weight of the head. The base is frozen: that nobody has changed it is all there is to know.
        self._then = {name: tensor.detach().clone() for name, tensor in self._own.items()}
        self._fixed = {f"base_layer.{name}": tensor for name, tensor in _named_tensors(self._base)}
        self._frozen = [(t, t._version, t.data_ptr()) for t in (features, *self._fixed.values())]
        kind = features.device.type
        self._autocast = partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

    def values(self) -> Tensor:
        """See `LogitsSource`."""
        return self._sum(self._then, self.features)

    def with_graph(self, features: Tensor) -> Tensor:
        """See `LogitsSource`."""
        if not self._own_are_unchanged():
            raise RuntimeError(_STALE.format("the weights of the adapter have changed"))
        return self._sum(self._own, features)

    def loss(self, rows: Tensor, targets: Tensor, normaliser: float | None, smoothing: float) -> Tensor | None:
        """See `LogitsSource`."""
        if not self._head_is_unchanged():
            return None
        with self._autocast():
            return self._head.fused_loss(self.features[rows], targets, normaliser, label_smoothing=smoothing)

    def _sum(self, own: dict[str, Tensor], features: Tensor) -> Tensor:
        if not self._frozen_are_unchanged():
            raise RuntimeError(_STALE.format("frozen weights or hidden states have changed"))
        absent = [name for name in self._adapters if name not in self._head.lreg_nodes]
        if absent:
            raise RuntimeError(_STALE.format(f"the adapter {absent[0]!r} has been removed"))
        tensors = {f"head.{name}": tensor for name, tensor in (self._fixed | own).items()}
        with self._autocast():
            return functional_call(_Sum(self._head, self._adapters), tensors, (features,))  # type: ignore[no-any-return]

    def _frozen_are_unchanged(self) -> bool:
        return self._head.base_layer is self._base and all(
            t._version == version and t.data_ptr() == place for t, version, place in self._frozen
        )

    def _own_are_unchanged(self) -> bool:
        return all(_equal(tensor, self._then[name]) for name, tensor in self._own.items())

    def _head_is_unchanged(self) -> bool:
        """Whether the layer computes now what it did in this pass, with gradients of the same tensors."""
        if _mode(self._head) != self._mode or not self._frozen_are_unchanged():
            return False
        now = dict(_named_tensors(self._head))
        return (
            all(now.get(name) is tensor for name, tensor in (self._fixed | self._own).items())
            and all(tensor.requires_grad == self._trains[name] for name, tensor in self._own.items())
            and self._own_are_unchanged()
        )


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _own_tensors(head: LRegLayer) -> dict[str, Tensor]:
    """Those of the stacked adapters, whose names stand in those of their tensors and in no other."""
    adapters = set(head.stacked_adapters)
    return {
        name: tensor
        for name, tensor in _named_tensors(head)
        if not name.startswith("base_layer.") and not adapters.isdisjoint(name.split("."))
    }


def _mode(head: LRegLayer) -> tuple[Any, ...]:
    """What beside tensors decides what a layer computes."""
    return head.training, head.disable_adapters, head.batch_adapter_names, head.stacked_adapters


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is one of them."""
    return torch.equal(tensor, other) or torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


class _Sum(nn.Module):
    """The wrapped module with the shortcuts of given adapters, whichever are active."""

    def __init__(self, head: LRegLayer, adapters: list[str]) -> None:
        super().__init__()
        self.head, self._adapters = head, adapters

    def forward(self, features: Tensor) -> Tensor:
        hidden = first_tensor(self.head.base_layer(features))[0]
        for name in self._adapters:
            hidden = hidden + self.head.shortcut(name, features, hidden)
        return hidden
