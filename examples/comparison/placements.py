"""Where adapters go in an architecture: the names of its linear layers, of its output head, of a fresh head."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers inside the repeated layers of an architecture, as endings of their names.

    Attributes:
        attention: projections of the attention.
        feed_forward: projections of the feed-forward block.
        block: name of the whole feed-forward block as one module, None where there is no such module.
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    block: str | None = None


_BERT = LinearLayers(
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
)
_LLAMA = LinearLayers(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), "mlp")
_KNOWN = {
    "bert": _BERT,
    "gpt2": LinearLayers(("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def linear_layers(model: PreTrainedModel) -> LinearLayers:
    """The linear layers of a model; in an unknown architecture all that lie in repeated layers count as attention."""
    known = _KNOWN.get(model.config.model_type)
    if known is not None:
        return known
    endings: dict[str, None] = {}
    for name, module in model.named_modules():
        inside = [position for position, part in enumerate(name.split(".")) if part.isdigit()]
        if inside and isinstance(module, nn.Linear | Conv1D):
            endings[".".join(name.split(".")[inside[-1] + 1 :])] = None
    return LinearLayers(tuple(ending for ending in endings if ending), ())


def layer_sizes(layers: LinearLayers, size: int) -> dict[str, int]:
    """Rank, or components, per layer: `size` on the attention, half of it (rounded up) on the feed-forward block.

    The attention comes first: `output.dense` is also an ending of `attention.output.dense`, and the first match counts.
    """
    return {**dict.fromkeys(layers.attention, size), **dict.fromkeys(layers.feed_forward, -(-size // 2))}


def output_embedding_name(model: PreTrainedModel) -> str:
    """Name of the linear layer that makes the logits of a language model: `lm_head`, `lm_head.decoder`, ..."""
    embedding = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def fresh_head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the backbone that have parameters: the new head of a classification model."""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
