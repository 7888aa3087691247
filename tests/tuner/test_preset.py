"""What a configuration without target modules stands for: the recommended recipe, or the paper's placement."""

import dataclasses

import pytest
import tiny
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn

import lreg_peft
from lreg_peft import LRegConfig, inspect_targets, recommended_config


def fields(config):
    own = dataclasses.asdict(config)
    return {name: own[name] for name in LRegConfig.__annotations__ if name in own}


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_plain_call_is_the_recipe_with_its_smallest_shares(name, task):
    if (name, task) == ("roberta", "CAUSAL_LM"):
        task = "MASKED_LM"
    base = tiny.build(name, task)
    task_type = task if task in list(TaskType) else None
    expected = recommended_config(base, task_type=task_type)
    model = get_peft_model(base, LRegConfig(task_type=task_type))
    found = model.peft_config["default"]
    assert {**fields(found), "modules_to_save": None} == {**fields(expected), "modules_to_save": None}
    assert set(model.peft_config["default"].target_modules) == set(expected.target_modules)


def test_what_else_is_said_stays():
    base = tiny.gpt2()
    config = LRegConfig(n_nodes=5, init_weights="pca", train_projection=False, exclude_modules=["lm_head"])
    adapted = {name for name, module in get_peft_model(base, config).named_modules() if hasattr(module, "lreg_encoder")}
    assert config.n_nodes == 5 and config.init_weights == "pca" and not config.train_projection
    assert adapted and not any(name.endswith("lm_head") for name in adapted)


def test_the_papers_placement_by_name():
    config = LRegConfig(task_type="CAUSAL_LM", preset="paper")
    get_peft_model(tiny.gpt2(), config)
    assert config.target_modules == ["lm_head"]
    assert (config.weighting, config.n_components, config.n_nodes, config.linear_term) == ("full", 2, 2, False)


def test_looking_does_not_fill_in():
    config = LRegConfig(task_type="CAUSAL_LM")
    assert len(inspect_targets(tiny.gpt2(), config)) > 3
    assert config.target_modules is None and config.n_nodes is None


def test_models_without_blocks_of_linear_layers_get_the_papers_placement():
    base, _ = tiny.image_model("resnet")
    config = LRegConfig()
    get_peft_model(base, config)
    assert config.weighting == "full" and config.n_nodes == 2
    with pytest.raises(ValueError, match="no default target_modules for Sequential"):
        get_peft_model(nn.Sequential(nn.Conv2d(2, 2, 1)), LRegConfig())


def test_it_trains_and_comes_back(tmp_path):
    batch = tiny.inputs("gpt2")
    batch = {**batch, "labels": batch["input_ids"]}
    model = get_peft_model(tiny.gpt2(), LRegConfig(task_type="CAUSAL_LM"))
    lreg_peft.initialize_lreg_weights(model, [batch], show_progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
    assert loaded.peft_config["default"].n_nodes == 8
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_second_adapter_gets_the_same_places():
    model = get_peft_model(tiny.gpt2(), LRegConfig(task_type="CAUSAL_LM"))
    model.add_adapter("second", LRegConfig(task_type="CAUSAL_LM"))
    first, second = (fields(model.peft_config[name]) for name in ("default", "second"))
    assert first == second


def test_a_language_model_is_no_classifier():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is a language model: load the base with AutoModelForSeq"):
        get_peft_model(tiny.gpt2(), LRegConfig(task_type="SEQ_CLS"))


def test_the_recipe_trains_the_new_head_of_a_classifier():
    base = tiny.build("roberta", "SEQ_CLS")
    config = recommended_config(base)
    assert config.task_type == "SEQ_CLS"
    names = [n for n, p in get_peft_model(base, config).named_parameters() if p.requires_grad and "classifier" in n]
    assert names


def test_a_budget_for_next_to_nothing_is_told():
    with pytest.warns(UserWarning, match="for none inside the network"):
        recommended_config(tiny.gpt2(), budget=80)
