"""Sentence embeddings: add an adapter, train, save, load."""

import tempfile
from pathlib import Path

import numpy as np
from common import moved, run, shortcut_state, sizes, texts, tokenizer
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel

from lreg_peft import LRegConfig


def base(folder: Path) -> SentenceTransformer:
    BertModel(BertConfig(**sizes())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def train_save_load() -> None:
    folder = Path(tempfile.mkdtemp())
    model = base(folder / "base")
    model.add_adapter(LRegConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "key"]))
    before = shortcut_state(model)
    data = Dataset.from_dict({"anchor": texts(8), "positive": texts(9)[1:]})
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"), max_steps=3, use_cpu=True, report_to=[], learning_rate=1e-2, save_strategy="no"
    )
    SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)).train()
    assert moved(before, model), "some shortcuts did not move"
    expected = model.encode(texts(4))
    model.save_pretrained(str(folder / "saved"))
    assert np.allclose(SentenceTransformer(str(folder / "saved"), device="cpu").encode(texts(4)), expected, atol=1e-6)


if __name__ == "__main__":
    run({"train, save and load an encoder": train_save_load})
