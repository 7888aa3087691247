"""What the module that ends a model sees, row by row with the labels, in passes that are made for whatever reason."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .core.distributed import rank_and_world, together
from .modules import unwrap
from .rows import (
    Pairing,
    align,
    exact_pass,
    find_pairing,
    last_tokens,
    logits_of,
    loss_of,
    model_inputs,
    same_output,
    width_of,
)
from .tuner.layer import LRegLayer
from .tuner.layout import first_tensor

# Rows of a pass in which the output of the module is compared with that of the model.
_COMPARED = 64


class SeenRows(NamedTuple):
    """The rows of one pass, one for each label that counts.

    Attributes:
        features: `[n, width]`, what the module was given.
        targets: int64 `[n]`, or `[n, out_features]`.
        samples: int64 `[n]`, which sample of the batch each row belongs to.
        logits: `[n, out_features]`, the model's own; None if they were not asked for.
    """

    features: Tensor
    targets: Tensor
    samples: Tensor
    logits: Tensor | None

    def few(self, most: int) -> "SeenRows":
        """At most so many of the rows, evenly spaced."""
        chosen = spaced(len(self.targets), most).to(self.targets.device)
        logits = None if self.logits is None else self.logits[chosen]
        return SeenRows(self.features[chosen], self.targets[chosen], self.samples[chosen], logits)


class OutputRows(AbstractContextManager["OutputRows"]):
    """Watches the module that ends a model for the time of a block.

    Args:
        model: the model, in wrappers or not.
        module: a linear layer in it, or one with a shortcut.
        adapter_name: whose shortcut, where there is one.
        purpose: what the rows are for, as errors say it.
        instead: what to do where the module is not of the kind for that.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        adapter_name: str,
        purpose: str = "a start of {name!r}",
        instead: str = "leave it as it is (start_head=False)",
    ) -> None:
        self.model, self.adapter_name = unwrap(model), adapter_name
        self.name = next(name for name, one in self.model.named_modules() if one is module)
        self.purpose, self._instead = purpose.format(name=self.name), instead
        self.out_features: int = module.out_features  # type: ignore[assignment]
        #: How the model makes its loss of rows; None until a pass with labels that count has been seen.
        self.pairing: Pairing | None = None
        self._module = module
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Self:
        self._hook = self._module.register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self._seen.clear()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        output = first_tensor(output)[0].detach()
        if isinstance(module, LRegLayer):
            features = module.seen_features(args, kwargs)
            features = module.layout(self.adapter_name, features, output).rows(features)
        else:
            features = args[0]
        self._seen.append((features.detach(), output))

    def read(self, model: nn.Module, batches: Iterable[Any], take: Callable[[Mapping[str, Any], Any], None]) -> None:
        """Make passes over batches for nothing else; `take` gets the inputs of each and what the model returned."""
        with together(), self, exact_pass(model):
            for batch in batches:
                inputs = model_inputs(model, batch, labels=False)
                take(inputs, model(**inputs))

    @torch.no_grad()
    def of_pass(self, inputs: Mapping[str, Any], output: Any, *, with_logits: bool = True) -> SeenRows:
        """The rows of the pass that has just been made.

        Args:
            inputs: of the model, with labels.
            output: what it returned.
            with_logits: whether to look at the model's own logits, too, and compare those of the module with them.

        Raises:
            ValueError: if there are no labels or they do not fit, if the module does not give the model's output, or
                if the model's loss is not the mean over its rows.
        """
        seen, self._seen = self._seen, []
        labels, own = inputs.get("labels"), logits_of(output)
        if not isinstance(labels, Tensor):
            raise ValueError(f"{self.purpose} needs labels: give batches with 'labels', a tensor.")
        if len(seen) != 1 or not isinstance(own, Tensor) or width_of(own) != self.out_features:
            raise ValueError(
                f"{self.name!r} does not give the output of {type(self.model).__name__}, as {self.purpose} needs: it "
                f"must be called once in a forward pass and end the model, and was called {len(seen)} times; "
                f"{self._instead}."
            )
        features, made = seen[0]
        pairing = self.pairing or find_pairing(self.model, own.detach(), labels, loss_of(output))
        pool = partial(last_tokens, inputs=inputs, config=getattr(self.model, "config", None), name=self.name)
        pair = partial(align, labels=labels, shift=pairing.shift, out_features=self.out_features, pool=pool)
        rows, logits = pair(features), None
        if with_logits:
            logits = pair(own.detach()).features
            if not (_alike(made, own) if made.shape == own.shape else _alike(pair(made).features, logits)):
                raise self.refusal()
        if len(rows.targets):  # else the loss has shown nothing
            self.pairing = pairing
        sample = torch.arange(len(labels), device=features.device).view(-1, *[1] * (features.ndim - 1))
        samples = pair(sample.expand(*features.shape[:-1], 1)).features[:, 0]
        return SeenRows(*rows, samples, logits)

    def refusal(self) -> ValueError:
        """The error where rows cannot repeat what the model does."""
        return ValueError(
            f"{type(self.model).__name__} changes what {self.name!r} gives before it is the output, which "
            f"{self.purpose} does not know of: {self._instead}."
        )


def per_pass(most: int, n_batches: int) -> int:
    """How many rows to keep of each pass, to have `most` of `n_batches` passes in every process."""
    return -(-most // (n_batches * rank_and_world()[1]))


def spaced(n: int, most: int) -> Tensor:
    """Positions of at most so many of n rows, evenly spaced, on the CPU."""
    few = min(n, most)
    return torch.arange(few, device="cpu") * n // max(few, 1)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs `[..., out_features]` are the same, as some of their rows show."""
    one, other = (values.reshape(-1, values.shape[-1]) for values in (one, other))
    few = spaced(len(one), _COMPARED).to(one.device)
    return same_output(one[few], other[few])
