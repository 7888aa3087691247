"""Profiles in a group of their own: everything that trains is in one group, moves follow, errors."""

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from lreg_peft import parameter_groups, track_statistics, update_meshes


def factored(**options):
    return tiny.adapt(tiny.gpt2(), weighting="factored", linear_term=True, target_modules=["c_attn", "mlp"], **options)


def test_everything_that_trains_is_in_one_group():
    model = factored()
    rest, profiles = parameter_groups(model, 0.01, profile_ratio=3.0, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"], profiles["lr"], profiles["weight_decay"]) == (0.01, 0.1, 0.03, 0.0)
    found = [id(weight) for group in (rest, profiles) for weight in group["params"]]
    assert sorted(found) == sorted(id(weight) for weight in model.parameters() if weight.requires_grad)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert all(".lreg_encoder." in names[id(weight)] for weight in profiles["params"])
    assert not any(".lreg_encoder." in names[id(weight)] for weight in rest["params"])


def test_trainer_keeps_the_ratio(tmp_path):
    model = factored()
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, tiny.VOCABULARY, (4, 9))]
    options = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01))
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=data, optimizers=(optimizer, None))
    rates = []
    step = optimizer.step
    optimizer.step = lambda *a, **k: (rates.append([group["lr"] for group in optimizer.param_groups]), step(*a, **k))[1]
    trainer.train()
    assert len(rates) == 2
    assert all(fast == pytest.approx(4 * slow) for slow, fast in rates)


def test_meshes_move_with_the_moments_of_both_groups():
    model = factored(n_nodes=8).train()
    tiny.shake(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01))
    track_statistics(model)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 9))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert update_meshes(model, optimizer).n_moved


def test_without_profiles_one_sentence():
    with pytest.raises(ValueError, match=r"no profile that trains.*weighting='factored'"):
        parameter_groups(tiny.adapt(tiny.gpt2()), 0.01)
    with pytest.raises(ValueError, match="no profile that trains"):
        parameter_groups(factored().requires_grad_(False), 0.01)
