"""What a comparison has to know about, or change in, the configuration of any architecture."""

from transformers import PretrainedConfig

DROPOUT_OPTIONS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "drop_connect_rate",
    "drop_path_rate",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "summary_first_dropout",
)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration without dropout, changed in place: all methods train as the paper trains LReg."""
    for option in DROPOUT_OPTIONS:
        if isinstance(getattr(config, option, None), float):
            setattr(config, option, 0.0)
    return config


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens a model has positions for; RoBERTa counts its positions from the one after the padding token."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "roberta" in config.model_type:
        return positions - config.pad_token_id - 1
    return positions
