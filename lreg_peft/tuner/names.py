"""Names of modules and adapters: those of the model behind `torch.compile`, and those that torch can hold."""

from collections.abc import Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_COMPILED = "_orig_mod"


def plain_name(name: str) -> str:
    """The name of a module or tensor as it is without `torch.compile`, which puts `_orig_mod` into the path.

    Configurations and files speak of plain names, so that they fit the compiled model and the other alike.
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name


def is_compiled_inside(name: str) -> bool:
    """Whether this is the module inside a `torch.compile` wrapper, whose plain name the wrapper has too."""
    return name.rpartition(".")[2] == _COMPILED


def restore_compiled_names(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A saved adapter with the entries of `modules_to_save` under the names that `model`, perhaps compiled, has.

    Args:
        model: with the adapter in place.
        state_dict: as PEFT saves it, by plain names or by those of a compiled model.
        adapter_name: of the adapter in `model`.
    """
    state = {plain_name(key): value for key, value in state_dict.items()}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in module.adapter_state_dict_load_map(adapter_name):
                own = f"{path}.{key}"
                if own not in state and (plain := plain_name(own)) in state:
                    state[own] = state.pop(plain)
    return state
