"""The rows that the start of an output is computed from: of some passes, in two halves that judge each other."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..core.distributed import rank_and_world, together
from ..output_rows import OutputRows
from ..rows import exact_pass, model_inputs


class StartRows(OutputRows):
    """Watches the module that ends a model in the passes of a start.

    Args:
        model: the model.
        module: the module whose output is to start somewhere.
        adapter_name: whose shortcut, where there is one.
        n_batches: passes there will be at most, in each process.
        most: rows to keep, over all passes and processes.
        purpose: see `OutputRows`.
        instead: see `OutputRows`.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        adapter_name: str,
        n_batches: int,
        most: int,
        purpose: str = "a start of {name!r}",
        instead: str = "leave it as it is (start_head=False)",
    ) -> None:
        super().__init__(model, module, adapter_name, purpose, instead)
        #: Of one pass.
        self.quota = -(-most // (n_batches * rank_and_world()[1]))

    def take(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Keep what is needed of the pass that has just been made, from its inputs and what the model returned."""
        raise NotImplementedError

    def read(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Take from passes over batches that are made for nothing else."""
        with together(), self, exact_pass(model):
            for batch in batches:
                inputs = model_inputs(model, batch, labels=False)
                self.take(inputs, model(**inputs))
