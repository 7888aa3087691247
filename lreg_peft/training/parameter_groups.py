"""Groups of parameters for an optimiser in which profiles learn faster than the rest."""

from typing import Any

from torch import nn

from ..core.checks import number
from ..tuner.layer import LRegLayer


def parameter_groups(
    model: nn.Module, learning_rate: float, *, profile_ratio: float = 4.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two groups for an optimiser: the profiles of factored weighting, and everything else that trains.

    A profile multiplies a whole output vector, and has a few numbers where that has hundreds; with one rate for all,
    the shapes of the functions lag behind their directions. As in LoRA+, whose factors learn at two rates, the ratio
    is another hyper-parameter.

        optimizer = torch.optim.AdamW(lreg_peft.parameter_groups(model, 2e-2))
        trainer = Trainer(model, args, optimizers=(optimizer, None), ...)      # Trainer makes the schedule

    Args:
        model: any module that contains LReg layers.
        learning_rate: of everything but the profiles.
        profile_ratio: how many times faster the profiles learn. They are not decayed: their mean carries the constant.
        weight_decay: of everything but the profiles.

    Returns:
        The groups, each with "params", "lr" and "weight_decay"; every parameter that requires gradients is in one.

    Raises:
        ValueError: if the model has no profile that trains, or a number is out of range.
        TypeError: for arguments of a wrong type.
    """
    number("learning_rate", learning_rate, above=0)
    number("profile_ratio", profile_ratio, above=0)
    number("weight_decay", weight_decay, 0)
    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    encoders = [encoder for layer in layers for encoder in layer.lreg_encoder.values()]
    profiles = {id(weight): weight for encoder in encoders for weight in encoder.parameters() if weight.requires_grad}
    if not profiles:
        raise ValueError(
            f"{type(model).__name__} has no profile that trains, so there is nothing to set apart: profiles are those "
            "of weighting='factored'; hand model.parameters() to the optimiser, or activate the adapter by set_adapter."
        )
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in profiles]
    return [
        {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": list(profiles.values()), "lr": learning_rate * profile_ratio, "weight_decay": 0.0},
    ]
