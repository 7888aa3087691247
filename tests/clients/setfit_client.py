"""SetFit: few-shot classification with an adapted encoder."""

import tempfile
from pathlib import Path

from common import moved, run, shortcut_state, texts
from datasets import Dataset
from sentence_transformers_client import base
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

from lreg_peft import LRegConfig


def train() -> None:
    body = base(Path(tempfile.mkdtemp()))
    body.add_adapter(LRegConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "key"]))
    model = SetFitModel(model_body=body, model_head=LogisticRegression())
    before = shortcut_state(body)
    data = Dataset.from_dict({"text": texts(8), "label": [i % 2 for i in range(8)]})
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=2, batch_size=4, report_to="none", body_learning_rate=1e-2
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert moved(before, body), "some shortcuts did not move"
    assert len(model.predict(texts(4))) == 4


if __name__ == "__main__":
    run({"train an encoder and a head": train})
