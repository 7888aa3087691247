"""What must work with every set of versions that the package allows; `.ci/lowest.py` runs this file with the lowest."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import VOCABULARY, gpt2, layers, outputs, shake
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lreg_peft import LRegCallback, LRegConfig, cache_features, fit_coefficients, initialize_lreg_weights


def samples(n: int = 16, length: int = 8) -> list[dict[str, torch.Tensor]]:
    # Six tokens of the vocabulary: something to learn in a few steps.
    ids = torch.randint(3, 9, (n, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, 0] = -100  # no position predicts it, and Trainer would count it
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def batches(size: int = 4) -> list[dict[str, torch.Tensor]]:
    data = samples()
    return [
        {name: torch.stack([sample[name] for sample in data[start : start + size]]) for name in data[0]}
        for start in range(0, len(data), size)
    ]


@torch.no_grad()
def mean_loss(model) -> float:
    return sum(model(**batch).loss.item() for batch in batches()) / len(batches())


def train(model, folder, dataset, **options) -> list[float]:
    """Some steps of a Trainer; the logged losses."""
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=dataset, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_head_with_the_fused_loss(tmp_path):
    """Equal loss and gradients with logits and without, and a training that gets somewhere."""
    fused, usual = (
        get_peft_model(
            gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", n_components=2, n_nodes=4, fused_loss=choice)
        ).train()
        for choice in (True, False)
    )
    gradients = []
    for model in (fused, usual):
        shake(model)
        model(**batches()[0])  # in which the two are compared
        output = model(**batches()[0])
        if model is usual:
            assert output.logits.shape == (4, 8, VOCABULARY)
        else:
            assert output.logits is None
        output.loss.backward()
        gradients.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # sums in another order, of fp32
    before = mean_loss(fused)
    train(fused, tmp_path, samples())
    assert mean_loss(fused) < 0.9 * before


def test_blocks_with_a_start_from_gradients_and_moving_meshes(tmp_path):
    config = LRegConfig(task_type="CAUSAL_LM", target_modules=["mlp"], n_nodes=6, init_weights="gradient")
    model = get_peft_model(gpt2(), config)
    before = outputs(model)
    initialize_lreg_weights(model, batches())
    assert torch.equal(outputs(model), before)
    start = [layer.lreg_encoder["default"].nodes.clone() for layer in layers(model)]
    loss = mean_loss(model)
    train(model, tmp_path, samples(), callbacks=[LRegCallback(every=3, n_check_batches=0)])
    assert mean_loss(model) < loss - 0.1
    assert any(
        not torch.equal(layer.lreg_encoder["default"].nodes, old)
        for layer, old in zip(layers(model), start, strict=True)
    )


def test_save_and_load(tmp_path):
    model = get_peft_model(gpt2(), LRegConfig(task_type="CAUSAL_LM", target_modules=["mlp", "lm_head"], n_nodes=5))
    shake(model)
    model.save_pretrained(tmp_path)
    assert "import lreg_peft" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert torch.equal(outputs(PeftModel.from_pretrained(gpt2(), tmp_path)), outputs(model))


def test_adapters_of_transformers(tmp_path):
    model = gpt2()
    model.add_adapter(LRegConfig(target_modules=["mlp"], n_nodes=5))
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = gpt2()
    loaded.load_adapter(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))


def test_fit_from_a_cache(tmp_path):
    """The cache gives a Trainer the losses that the samples give, and a fit the optimum of the same objective."""
    config = LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], n_components=2, n_nodes=4)
    torch.manual_seed(1)
    model = get_peft_model(gpt2(), config).train()
    cache = cache_features(
        model, DataLoader(samples(), 4), tmp_path / "cache", dtype=torch.float32, show_progress=False
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    from_cache = train(model, tmp_path, cache, data_collator=cache.collate)
    model.load_state_dict(state)
    assert from_cache == pytest.approx(train(model, tmp_path, samples()), rel=1e-3)  # the log has four decimals
    fits = []
    for data in (cache, batches()):
        model.load_state_dict(state)
        fits.append(fit_coefficients(model, data, ridge=1e-2))
    assert fits[0].objective == pytest.approx(fits[1].objective, abs=fits[0].gap + fits[1].gap + 1e-6)
    assert fits[0].gap < 1e-4
