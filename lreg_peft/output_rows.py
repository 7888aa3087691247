"""What the module that ends a model sees, row by row with the labels, in passes that are made for whatever reason."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .core.distributed import together
from .modules import unwrap
from .rows import (
    Pairing,
    align,
    are_values,
    exact_pass,
    find_pairing,
    is_per_token,
    last_tokens,
    logits_of,
    loss_of,
    model_inputs,
    rows_per_sample,
    same_output,
)
from .tuner.layer import LRegLayer
from .tuner.layout import first_tensor

# Rows of a pass in which the output of the module is compared with that of the model.
_COMPARED = 64


class SeenRows(NamedTuple):
    """The rows of one pass, one for each label that counts.

    Attributes:
        features: `[n, width]`, what the module was given.
        logits: `[n, out_features]`, the model's own.
        targets: int64 `[n]`, or `[n, out_features]`.
        samples: int64 `[n]` on the CPU, which sample of the batch each row belongs to.
    """

    features: Tensor
    logits: Tensor
    targets: Tensor
    samples: Tensor


class OutputRows(AbstractContextManager["OutputRows"]):
    """Watches the module that ends a model for the time of a block.

    Args:
        model: the model, in wrappers or not.
        module: a linear layer in it, or one with a shortcut.
        adapter_name: whose shortcut, where there is one.
        purpose: what the rows are for, as errors say it; None: a start of the module.
        instead: what to do where the module is not of the kind for that.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        adapter_name: str,
        purpose: str | None = None,
        instead: str = "leave it as it is (start_head=False)",
    ) -> None:
        self.model = unwrap(model)
        self.name = next(name for name, one in self.model.named_modules() if one is module)
        self.purpose = f"a start of {self.name!r}" if purpose is None else purpose
        self._instead = instead
        self.out_features: int = module.out_features  # type: ignore[assignment]
        #: How the model makes its loss of rows; None until a pass with labels that count has been seen.
        self.pairing: Pairing | None = None
        self._module, self._adapter_name = module, adapter_name
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "OutputRows":
        self._hook = self._module.register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        output = first_tensor(output)[0].detach()
        if isinstance(module, LRegLayer):
            features = module.seen_features(args, kwargs)
            features = module.layout(self._adapter_name, features, output).rows(features)
        else:
            features = args[0]
        self._seen.append((features.detach(), output))

    def take(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Keep what is needed of the pass that has just been made, from its inputs and what the model returned."""
        raise NotImplementedError

    def read(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Take from passes over batches that are made for nothing else."""
        with together(), self, exact_pass(model):
            for batch in batches:
                inputs = model_inputs(model, batch, labels=False)
                self.take(inputs, model(**inputs))

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Any], output: Any) -> SeenRows:
        """The rows of the pass that has just been made.

        Args:
            inputs: of the model, with labels.
            output: what it returned.

        Raises:
            ValueError: if there are no labels or they do not fit, if the module does not give the model's output, or
                if the model's loss is not the mean over its rows.
        """
        seen, self._seen = self._seen, []
        labels, own, kind = inputs.get("labels"), logits_of(output), type(self.model).__name__
        if not isinstance(labels, Tensor):
            raise ValueError(f"{self.purpose} needs labels: give batches with 'labels', a tensor.")
        if len(seen) != 1 or not isinstance(own, Tensor) or not own.ndim or own.shape[-1] != self.out_features:
            raise ValueError(
                f"{self.name!r} does not give the output of {kind}, as {self.purpose} needs it: it must be called "
                f"once in a forward pass and end the model, and was called {len(seen)} times; {self._instead}."
            )
        ((features, made),), own = seen, own.detach()
        pairing = self.pairing or find_pairing(self.model, own, labels, loss_of(output))
        shift = pairing.shift
        pool = partial(last_tokens, inputs=inputs, config=getattr(self.model, "config", None), name=self.name)
        pair = partial(align, labels=labels, shift=shift, out_features=self.out_features, pool=pool)
        kept, logits = pair(features), pair(own).features
        if len(kept.targets):  # else the loss has shown nothing
            self.pairing = pairing
        if not (_alike(made, own) if made.shape == own.shape else _alike(pair(made).features, logits)):
            raise ValueError(
                f"{kind} changes what {self.name!r} gives before it is the output, which {self.purpose} does not know "
                f"of: {self._instead}."
            )
        samples = torch.arange(len(labels), device="cpu")
        if not are_values(labels, self.out_features):
            counts = rows_per_sample(labels, shift=shift and is_per_token(features, labels))
            samples = samples.repeat_interleave(torch.tensor(counts, device="cpu"))
        return SeenRows(kept.features, logits, kept.targets, samples)


def spaced(n: int, most: int) -> Tensor:
    """Positions of at most so many of n rows, evenly spaced, on the CPU."""
    few = min(n, most)
    return torch.arange(few, device="cpu") * n // max(few, 1)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs `[..., out_features]` are the same, as some of their rows show."""
    one, other = (values.reshape(-1, values.shape[-1]) for values in (one, other))
    few = spaced(len(one), _COMPARED).to(one.device)
    return same_output(one[few], other[few])
