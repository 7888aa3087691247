"""Lightning: train, checkpoint, resume."""

import tempfile
from pathlib import Path

import lightning
import torch
from common import causal_lm, moved, run, shortcut_state, texts, tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model
from torch.utils.data import DataLoader

from lreg_peft import LRegConfig


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = get_peft_model(causal_lm(), LRegConfig(target_modules=["mlp", "lm_head"], n_nodes=6))

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def trainer(folder: Path) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
    )


def data() -> DataLoader:
    return DataLoader(tokenizer()(texts(), return_tensors="pt").input_ids, batch_size=4)


def train_and_resume() -> None:
    folder = Path(tempfile.mkdtemp())
    straight = Module()
    before = shortcut_state(straight)
    trainer(folder).fit(straight, data())
    assert moved(before, straight), "some shortcuts did not move"
    resumed = Module()  # another projection: all of it must come from the checkpoint
    trainer(folder / "resumed").fit(resumed, data(), ckpt_path=folder / "epoch=0.ckpt", weights_only=False)
    for name, value in shortcut_state(straight).items():
        assert torch.equal(value, shortcut_state(resumed)[name]), f"{name} differs after resuming"


if __name__ == "__main__":
    run({"train, and resume exactly": train_and_resume})
