"""Lightning: train, checkpoint, resume."""

import tempfile

import lightning
import torch
from common import causal_lm, moved, run, shortcut_state, texts, tokenizer
from peft import get_peft_model
from torch.utils.data import DataLoader

from lreg_peft import LRegConfig


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = get_peft_model(causal_lm(), LRegConfig(target_modules=["mlp", "lm_head"], dof=6))

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def trainer(steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )


def data() -> DataLoader:
    return DataLoader(tokenizer()(texts(), return_tensors="pt").input_ids, batch_size=4)


def train_and_resume() -> None:
    straight = Module()
    before = shortcut_state(straight)
    trainer(4).fit(straight, data())
    assert moved(before, straight), "some shortcuts did not move"
    torch.manual_seed(0)
    first = Module()
    run_one = trainer(2)
    run_one.fit(first, data())
    path = f"{tempfile.mkdtemp()}/half.ckpt"
    run_one.save_checkpoint(path)
    second = Module()
    trainer(4).fit(second, data(), ckpt_path=path, weights_only=False)
    for name, value in shortcut_state(straight).items():
        assert torch.equal(value, shortcut_state(second)[name]), f"{name} differs after resuming"


if __name__ == "__main__":
    run({"train, and resume exactly": train_and_resume})
