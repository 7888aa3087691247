"""The offline default of both scripts, made without a download: a small GPT-2 that has read Python's docstrings."""

from pathlib import Path

import torch
from arguments import parse_arguments
from base_model import base_config
from data import causal_blocks, encode, load_corpus, train_tokenizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, default_data_collator, get_linear_schedule_with_warmup


def offline_base(folder: Path, smoke: bool, show_progress: bool) -> str:
    """The folder with model and tokenizer; trains them, as the comparison does, unless an earlier start has done that.

    Args:
        folder: where they are kept.
        smoke: whether to make a very small one.
        show_progress: whether to show a bar.
    """
    if (folder / "model.safetensors").is_file():
        return str(folder)
    arguments = parse_arguments(["--smoke"] if smoke else [])
    scale, steps = arguments.scale, arguments.scale.base_steps
    corpus = load_corpus(arguments.data, needs_base_text=True, max_base_chars=scale.max_base_chars)
    tokenizer = train_tokenizer(corpus.base + corpus.train, scale.vocab_size, masked=False)
    blocks = causal_blocks(encode(tokenizer, corpus.base), scale.block_size, "base")
    loader = DataLoader(blocks, scale.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = GPT2LMHeadModel(base_config(arguments, tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.model.base_learning_rate or 0.0, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    bar = tqdm(total=steps, desc="base model", disable=not show_progress)
    while schedule.last_epoch < steps:  # a bar that is switched off does not count
        for batch in loader:
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            if schedule.last_epoch == steps:
                break
    bar.close()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
