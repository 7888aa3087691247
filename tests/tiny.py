"""Models of a few thousand parameters, built from their configurations with seeded random weights, and inputs."""

import copy

import torch
import transformers
from peft import get_peft_model
from torch import nn

from lreg_peft import LRegConfig, LRegLayer

VOCABULARY = 61
HIDDEN = 16
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA_LIKE = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
_GPT2_LIKE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    "albert": {**_SIZES, "embedding_size": HIDDEN},
    "bert": _SIZES,
    "deberta-v2": _SIZES,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": HIDDEN,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 2,
    },
    "electra": {**_SIZES, "embedding_size": HIDDEN},
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gpt2": {**_GPT2_LIKE, "n_positions": 40, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2},
    "gpt_neo": {
        **_GPT2_LIKE,
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": _SIZES,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "opt": {
        **{name: size for name, size in _SIZES.items() if name != "intermediate_size"},
        "ffn_dim": 32,
        "word_embed_proj_dim": HIDDEN,
    },
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "roberta": _SIZES,
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "decoder_start_token_id": 2,
    },
    "vit": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
    },
    "xlm-roberta": _SIZES,
}
_STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "num_labels": 5}
_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}
#: Image models: configuration, and height and width of their input.
IMAGE_MODELS = {
    "resnet": ({**_STAGES, "embedding_size": 8, "layer_type": "basic"}, 64),
    "regnet": ({**_STAGES, "embedding_size": 8, "groups_width": 4}, 64),
    "convnext": (_STAGES, 64),
    "convnextv2": (_STAGES, 64),
    "mobilenet_v2": ({"depth_multiplier": 0.1, "min_depth": 8, "depth_divisible_by": 8, "num_labels": 5}, 64),
    "efficientnet": ({"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "num_labels": 5}, 64),
    "swin": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        | {"num_labels": 5},
        32,
    ),
    "segformer": (
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        | {"num_labels": 5, "decoder_hidden_size": 16},
        64,
    ),
    "vit": (_ENCODER, 8),
    "deit": ({**_ENCODER, "architectures": ["DeiTForImageClassification"]}, 8),
    "dinov2": (_ENCODER, 8),
    "beit": (_ENCODER, 8),
}
#: Options for every form of the coefficients.
WEIGHTINGS = {
    "full": {"weighting": "full"},
    "reduced": {"weighting": "reduced"},
    "factored": {"weighting": "factored"},
    "factored+linear": {"weighting": "factored", "linear_term": True},
}
AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "MASKED_LM": transformers.AutoModelForMaskedLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "IMAGE_CLS": transformers.AutoModelForImageClassification,
}


def configuration(model_type: str, options: dict):
    """Without dropout of any kind unless the options ask for it, so that train mode computes what eval mode does."""
    config = transformers.AutoConfig.for_model(model_type, **options)
    rates = {name: 0.0 for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)}
    return transformers.AutoConfig.for_model(model_type, **{**rates, **options})


def build(model_type: str, task: str, **options):
    """A model in eval mode; the same call always gives the same weights."""
    config = configuration(model_type, {**SIZES[model_type], **options})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AUTO_CLASSES[task].from_config(config)
        for parameter in model.parameters():  # the usual 0.02 leaves the logits of so small a model almost constant
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.3)
    return model.eval()


def image_model(model_type: str, **options):
    """A classifier of images in eval mode, whose batch norms have seen data, and a batch with labels for it."""
    sizes, side = IMAGE_MODELS[model_type]
    config = configuration(model_type, {**sizes, **options})
    generator = torch.Generator().manual_seed(5)
    batch = {
        "pixel_values": torch.randn(6, 3, side, side, generator=generator),
        "labels": torch.arange(6) % config.num_labels,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForImageClassification.from_config(config).train()
        with torch.no_grad():
            for _ in range(20):
                model(pixel_values=batch["pixel_values"])
    return model.eval(), batch


def gpt2(**options):
    return build("gpt2", "CAUSAL_LM", **options)


def roberta(task: str = "MASKED_LM", **options):
    return build("roberta", task, **options)


def llama(**options):
    return build("llama", "CAUSAL_LM", **options)


def inputs(model_or_type=None, batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """A batch for the given model or model type."""
    model_type = getattr(getattr(model_or_type, "config", None), "model_type", model_or_type)
    generator = torch.Generator().manual_seed(3)
    if model_type == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    batch_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_type == "t5":
        batch_inputs["decoder_input_ids"] = ids.flip(1)
    return batch_inputs


@torch.no_grad()
def outputs(model: nn.Module, **extra) -> torch.Tensor:
    """First tensor of the model's output for `inputs`, dropout off."""
    training = model.training
    model.eval()
    result = model(**inputs(model.get_base_model() if hasattr(model, "get_base_model") else model), **extra)
    model.train(training)
    return result.logits if "logits" in result else result[0]


def adapt(model: nn.Module, adapter_name: str = "default", **options):
    return get_peft_model(model, LRegConfig(preset="paper", **options), adapter_name=adapter_name)


def shake(model: nn.Module, adapter_name: str = "default", seed: int = 11) -> None:
    """Give an adapter weights such as training leaves: none of them zero, nodes moved; the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        if adapter_name not in layer.lreg_encoder:
            continue
        for part in layer.parts(adapter_name):
            for weight in part.parameters():
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / 2)
        layer.lreg_encoder[adapter_name].nodes.pow_(1.3)  # keeps 0, 1 and the order


def layers(model: nn.Module) -> list[LRegLayer]:
    return [module for module in model.modules() if isinstance(module, LRegLayer)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def loss_of(model: nn.Module, train: bool = True) -> torch.Tensor:
    """A language model loss on `inputs`."""
    model.train(train)
    batch = inputs(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model(**batch, labels=batch["input_ids"]).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fresh(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
