"""What FSDP wants of a model before it divides it among processes."""

from typing import Any

from peft import PeftModel
from torch import nn

from comparison.errors import UserError


def shard_by_layer(model: nn.Module) -> None:
    """Prepare a model for FSDP2 in Accelerate 1.15, which shards word embeddings and output layer by themselves.

    The other units are to be the layers, and not the embeddings of BERT and RoBERTa: these would be sharded twice, and
    torch refuses that. It also refuses a parameter in two places, unless embeddings and output layer share it.
    """
    backbone: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    units = getattr(backbone, "_no_split_modules", None) or ()
    backbone._no_split_modules = [name for name in units if not name.endswith("Embeddings")]

    ends = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    weights = {getattr(module, "weight", None) for module in ends}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if names.setdefault(parameter, name) != name and parameter not in weights:
            raise UserError(
                f"FSDP cannot shard {type(backbone).__name__}: '{names[parameter]}' and '{name}' are one parameter. "
                "Use data parallelism, configs/accelerate_ddp.yaml."
            )
