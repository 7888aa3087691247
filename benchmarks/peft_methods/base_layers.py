"""Changes to a base model that leave its function alone and let more adapters take it."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def linear_instead_of_conv1d(model: PreTrainedModel) -> PreTrainedModel:
    """The layers of GPT-2 as `nn.Linear`: it keeps their weights transposed, in a class that many adapters refuse."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                inside, outside = layer.weight.shape
                linear = nn.Linear(inside, outside, device=layer.weight.device, dtype=layer.weight.dtype)
                linear.weight.copy_(layer.weight.T)
                linear.bias.copy_(layer.bias)
                setattr(parent, name, linear.train(layer.training))
    return model


def untie_head(model: PreTrainedModel) -> PreTrainedModel:
    """A weight of its own for the layer that makes the logits, for adapters that change the weights they stand on."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config = copy.deepcopy(model.config)
        model.config.tie_word_embeddings = False
    return model
