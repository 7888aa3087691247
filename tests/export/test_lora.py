"""An LReg adapter as a LoRA: the fit, what PEFT makes of the files, and what is refused."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from processes import run_program
from torch import nn
from transformers import AutoModelForCausalLM

import lreg_peft
from lreg_peft import LRegConfig, add_grade, convert_to_lora, recommended_config, save_as_lora

# What PEFT says of any LoRA on GPT-2: its inner layers are laid out the other way than its output layer, which is tied.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
LINEAR = {"weighting": "factored", "linear_term": True}


def batches(count: int = 6, length: int = 12, seed: int = 0, padding: int = 3, pad_id: int = 2) -> list[dict]:
    """Causal batches whose second sample ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        if padding:
            mask[1, -padding:], ids[1, -padding:] = 0, pad_id
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


DATA = batches()


def adapted(base: nn.Module, size: float = 0.3, straight: bool = False, **options) -> PeftModel:
    """With an adapter as training leaves it; `straight` makes its profiles constant."""
    model = tiny.adapt(base, **options)
    tiny.shake(model)
    soften(model, "default", size, straight)
    return model.eval()


def soften(model: nn.Module, name: str, size: float, straight: bool) -> None:
    for layer in tiny.layers(model):
        if name in layer.lreg_encoder:
            _, encoder, coefficients = layer.parts(name)
            coefficients.weight.data.mul_(size)
            if straight:
                encoder.weight.data.copy_(encoder.weight.mean(dim=1, keepdim=True).expand_as(encoder.weight))


def as_lora(base: nn.Module, config, state) -> PeftModel:
    """What PEFT makes of a conversion."""
    model = get_peft_model(base, copy.deepcopy(config))
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, data: list[dict] = DATA) -> torch.Tensor:
    return torch.cat([model(**batch).logits for batch in data])


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict] = DATA) -> float:
    return sum(model(**batch).loss.item() for batch in data) / len(data)


def convert(model, data=DATA, **options):
    return convert_to_lora(model, data, **{"max_rise": 100.0, "show_progress": False, **options})


def untied(base: nn.Module) -> nn.Module:
    """With an output layer of its own, as docs/how-to/deploy.md has it."""
    head = base.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    return base


# Files


ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lreg_peft":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

folder, adapter, data, out = sys.argv[1:]
batches = torch.load(data)
base = AutoModelForCausalLM.from_pretrained(folder).eval()
head = base.get_output_embeddings()
head.weight = nn.Parameter(head.weight.detach().clone())
base.config.tie_word_embeddings = False
model = PeftModel.from_pretrained(base, adapter).eval()
with torch.no_grad():
    loaded = torch.cat([model(**batch).logits for batch in batches])
    merged_model = model.merge_and_unload()
    merged = torch.cat([merged_model(**batch).logits for batch in batches])
assert not any("lora" in name for name, _ in merged_model.named_modules())
assert "lreg_peft" not in sys.modules
merged_model.save_pretrained(out)
torch.save((loaded, merged), out + "/logits.pt")
"""


def test_a_folder_loads_and_merges_where_lreg_is_not_installed(tmp_path):
    """The whole recipe of a GPT-2: inner layers, the norm before the output layer, the output layer, which is tied."""
    base = tiny.gpt2()
    base.save_pretrained(tmp_path / "base")
    config = recommended_config(base, 2500, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.gpt2(), config)
    tiny.shake(model)
    soften(model, "default", 0.2, straight=False)
    model.eval()
    report = save_as_lora(tmp_path / "lora", model, DATA, max_rise=10.0, show_progress=False)
    assert report.loss_before == pytest.approx(mean_loss(model), rel=1e-6)
    assert {"transformer.ln_f", "lm_head"} < report.not_linear.keys()
    assert "lm_head" in report.ranks and "transformer.ln_f" not in report.ranks
    assert all(0 <= share <= 1 for share in report.not_linear.values())
    assert "lm_head" in str(report) and "as LoRA" in str(report)
    torch.save(DATA, tmp_path / "data.pt")
    (tmp_path / "merged").mkdir()
    run_program(ELSEWHERE, *(str(tmp_path / name) for name in ("base", "lora", "data.pt", "merged")))
    loaded, merged = torch.load(tmp_path / "merged" / "logits.pt")
    here = logits(PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "lora").eval())  # tied: unmerged it does not matter
    torch.testing.assert_close(loaded, here, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, here, rtol=1e-4, atol=1e-4)  # another order of fp32 sums
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()  # the tie does not come back
    torch.testing.assert_close(logits(again), merged, rtol=1e-5, atol=1e-5)
    assert mean_loss(again) == pytest.approx(report.loss_after, rel=1e-4)


def test_a_classifier_that_was_trained_comes_along(tmp_path):
    data = [{**batch, "labels": torch.tensor([0, 1, 1, 0])} for batch in batches()]
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = adapted(tiny.roberta("SEQ_CLS"), **options, **LINEAR)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data.add_(0.1)
    report = save_as_lora(tmp_path, model, data, max_rise=10.0, show_progress=False)
    loaded = PeftModel.from_pretrained(tiny.roberta("SEQ_CLS"), tmp_path).eval()
    assert mean_loss(loaded, data) == pytest.approx(report.loss_after, rel=1e-5)
    weights = [
        module.classifier.modules_to_save["default"].out_proj.weight
        for module in (model.base_model.model, loaded.base_model.model)
    ]
    assert torch.equal(*weights)


def test_trained_tokens_come_along():
    model = adapted(tiny.llama(), target_modules=["q_proj"], trainable_token_indices=[5, 7], **LINEAR)
    for name, weight in model.named_parameters():
        if "trainable_tokens_delta" in name:
            weight.data.add_(0.5)
    config, state, report = convert(model)
    assert mean_loss(as_lora(tiny.llama(), config, state)) == pytest.approx(report.loss_after, rel=1e-5)


# The fit


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS)
def test_it_is_the_least_squares_fit_of_the_value(weighting):
    """Of the shortcut's value on the inputs that are no padding, against torch's own solver."""
    model = adapted(
        tiny.llama(), target_modules=["layers.1.mlp.down_proj"], n_components=2, n_nodes=4, **tiny.WEIGHTINGS[weighting]
    )
    layer, seen, values = tiny.layers(model)[0], [], []

    def see(module, args, output):
        counts = mask.bool()
        seen.append(args[0][counts].double())
        values.append((output - module.base_layer(args[0]))[counts].double())

    handle = layer.register_forward_hook(see)
    with torch.no_grad():
        for batch in DATA:
            mask = batch["attention_mask"]
            model(**batch)
    handle.remove()
    x, y = torch.cat(seen), torch.cat(values)
    for bias in ("none", "lora"):
        _, state, report = convert(model, bias=bias, ridge=1e-9)
        ones = x.new_ones(len(x), 1 if bias == "lora" else 0)
        best = torch.linalg.lstsq(torch.cat((x, ones), dim=1), y).solution
        a, b, *constant = state.values()
        torch.testing.assert_close((b @ a).double(), best[: x.shape[1]].T, rtol=2e-3, atol=2e-3)
        if constant:
            torch.testing.assert_close(constant[0].double(), best[-1], rtol=2e-3, atol=2e-3)
            left = (y - torch.cat((x, ones), dim=1) @ best).square().sum() / (y - y.mean(dim=0)).square().sum()
            assert report.not_linear.popitem()[1] == pytest.approx(left.item(), abs=1e-3)


def test_exact_for_constant_profiles_where_layers_take_a_bias():
    model = adapted(
        tiny.roberta(), straight=True, target_modules=["query", "dense"], n_components=2, n_nodes=4, **LINEAR
    )
    config, state, report = convert(model, bias="lora")
    # fp32 sums in another order
    torch.testing.assert_close(logits(as_lora(tiny.roberta(), config, state)), logits(model), rtol=1e-4, atol=1e-4)
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)
    assert max(report.not_linear.values()) < 1e-6
    merged = as_lora(tiny.roberta(), config, state).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    config, state, report = convert(model)
    assert not config.lora_bias
    assert not any(key.endswith("bias") for key in state)
    far = (logits(tiny.roberta()) - logits(model)).square().mean()
    near = (logits(as_lora(tiny.roberta(), config, state)) - logits(model)).square().mean()
    assert near < 0.25 * far  # what is missing are constants


def test_what_is_said_of_the_loss_is_what_peft_computes():
    for head in tiny.WEIGHTINGS.values():
        model = adapted(tiny.gpt2(), target_modules=["c_attn", "c_fc"], n_components=2, n_nodes=4, **head)
        config, state, report = convert(model)
        assert mean_loss(as_lora(tiny.gpt2(), config, state)) == pytest.approx(report.loss_after, rel=1e-5)


def test_padding_does_not_count():
    model = adapted(tiny.llama(), target_modules=["q_proj"], **LINEAR)
    states = [convert(model, batches(pad_id=pad_id))[1] for pad_id in (2, 9)]
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-6)
    other = convert(model, batches(padding=0))[1]
    assert any(not torch.allclose(states[0][key], other[key], rtol=1e-3) for key in other)


def test_a_rank_is_a_number_or_a_share():
    model = adapted(tiny.llama(), target_modules=["q_proj", "down_proj"], weighting="full", n_components=3, n_nodes=4)
    usual = convert(model)
    ranks = usual[2].ranks
    assert 3 <= max(ranks.values()) <= 12
    for rank in (1, 2):
        config, state, report = convert(model, rank=rank)
        assert set(report.ranks.values()) == {rank}
        assert config.r == rank == config.lora_alpha and not config.rank_pattern
        assert all(len(value) == rank for key, value in state.items() if "lora_A" in key)
    shared = convert(model, rank=0.6)
    assert all(shared[2].ranks[name] < ranks[name] for name in ranks)
    for name in ranks:  # the share that was asked for, of what the usual conversion has
        both = [
            found[1][f"base_model.model.{name}.lora_B.weight"] @ found[1][f"base_model.model.{name}.lora_A.weight"]
            for found in (usual, shared)
        ]
        kept = 1 - (both[0] - both[1]).square().sum() / both[0].square().sum()
        assert 0.6 - 1e-4 <= kept < 1 - 1e-4


def test_uniform_rank_fills_up_with_zeros():
    options = {"target_modules": ["q_proj", "down_proj"], "component_pattern": {"q_proj": 3}, "n_components": 1}
    model = adapted(tiny.llama(), **options, **LINEAR)
    config, state, report = convert(model)
    assert set(report.ranks.values()) == {1, 3}
    assert len(config.rank_pattern) == 2
    even, filled, same = convert(model, uniform_rank=True)
    assert set(same.ranks.values()) == {3} and even.r == 3 and not even.rank_pattern
    assert {len(value) for key, value in filled.items() if "lora_A" in key} == {3}
    results = [logits(as_lora(tiny.llama(), *found)) for found in ((config, state), (even, filled))]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_scales_count():
    model = adapted(tiny.roberta(), straight=True, target_modules=["query"], **LINEAR)
    for layer in tiny.layers(model):
        layer.set_scale("default", -0.5)
    config, state, _ = convert(model, bias="lora")
    torch.testing.assert_close(logits(as_lora(tiny.roberta(), config, state)), logits(model), rtol=1e-4, atol=1e-4)


def test_several_adapters_become_the_lora_of_their_sum():
    model = adapted(tiny.roberta(), straight=True, target_modules=["query"], **LINEAR)
    model.add_adapter("other", LRegConfig(target_modules=["query", "dense"], n_components=2, **LINEAR))
    tiny.shake(model, "other", seed=5)
    soften(model, "other", 0.3, straight=True)
    config, state, _ = convert(model, adapter_name=["default", "other"], bias="lora")
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(as_lora(tiny.roberta(), config, state)), logits(model), rtol=1e-4, atol=1e-4)
    config, state, _ = convert(model, adapter_name="other", bias="lora")
    model.base_model.set_adapter("other")
    torch.testing.assert_close(logits(as_lora(tiny.roberta(), config, state)), logits(model), rtol=1e-4, atol=1e-4)


def test_which_adapters_are_active_does_not_count():
    model = adapted(tiny.roberta(), target_modules=["query"], **LINEAR)
    model.add_adapter("other", LRegConfig(target_modules=["query", "dense"], **LINEAR))
    tiny.shake(model, "other", seed=5)
    alone = convert(model)
    model.base_model.set_adapter(["default", "other"])
    both = convert(model)
    assert alone[2] == both[2]
    assert alone[1].keys() == both[1].keys()
    for name, value in alone[1].items():
        assert torch.equal(value, both[1][name]), name


@pytest.mark.parametrize("form", ["additive", "composed"])
def test_a_stack_of_grades_is_one_lora(form):
    model = adapted(tiny.roberta(), straight=True, target_modules=["query"], **LINEAR)
    name = add_grade(model, form=form)
    tiny.shake(model, name, seed=5)
    soften(model, name, 0.3, straight=True)
    model.eval()
    config, state, report = convert(model, adapter_name=name, bias="lora")
    assert report.loss_before == pytest.approx(mean_loss(model), rel=1e-6)
    loaded = as_lora(tiny.roberta(), config, state)
    assert mean_loss(loaded) == pytest.approx(report.loss_after, rel=1e-5)
    if form == "additive":  # a composed grade reads the basis below, which is not linear
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_a_base_in_half_precision():
    """GPT-2 in bf16, with its layers that are laid out the other way and its tied output layer: the LoRA is in fp32."""
    base = tiny.gpt2().bfloat16()
    model = get_peft_model(base, recommended_config(base, 2500, task_type="CAUSAL_LM"))
    tiny.shake(model)
    soften(model, "default", 0.2, straight=False)
    config, state, report = convert(model.eval())
    assert {value.dtype for value in state.values()} == {torch.float32}
    lora = as_lora(tiny.gpt2().bfloat16(), config, state)
    # Sums of bf16 in another order, whose roundings (0.4 %) are averaged over some 280 tokens.
    assert mean_loss(lora) == pytest.approx(report.loss_after, rel=2e-3)
    assert report.loss_before == pytest.approx(mean_loss(model), rel=1e-6)
    full = get_peft_model(tiny.gpt2(), recommended_config(tiny.gpt2(), 2500, task_type="CAUSAL_LM"))
    full.load_state_dict(model.state_dict())
    in_full = convert(full.eval())[2]
    assert report.loss_after == pytest.approx(in_full.loss_after, rel=1e-2)


def test_constants_need_a_bias_to_merge_into():
    model = adapted(tiny.llama(), straight=True, target_modules=["q_proj"], **LINEAR)
    with pytest.warns(UserWarning, match="has no bias"):
        lora = as_lora(tiny.llama(), *convert(model, bias="lora")[:2])
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        lora.merge_and_unload()


def test_a_norm_goes_into_an_output_layer_without_a_shortcut():
    model = adapted(tiny.llama(), straight=True, target_modules=["model.norm"], n_components=2, **LINEAR)
    config, state, report = convert(model, n_batches=100)
    assert list(report.ranks) == list(config.target_modules) == ["lm_head"]
    assert list(report.not_linear) == ["model.norm"]
    assert state["base_model.model.lm_head.lora_B.weight"].shape == (tiny.VOCABULARY, 2)
    assert mean_loss(as_lora(tiny.llama(), config, state)) == pytest.approx(report.loss_after, rel=1e-5)
    base = mean_loss(tiny.llama())
    assert abs(report.loss_after - report.loss_before) < 0.5 * abs(base - report.loss_before)


# Convolutions


class Picture(nn.Module):
    def __init__(self, **options):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv = nn.Conv2d(3, 4, **options)
            self.out = nn.Linear(4, 2)

    def forward(self, pixels, labels):
        logits = self.out(self.conv(pixels).tanh().mean(dim=(2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pictures() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixels": torch.randn(4, 3, 9, 8, generator=generator), "labels": torch.tensor([0, 1, 0, 1])} for _ in range(4)
    ]


@pytest.mark.parametrize("bias", ["none", "lora"])
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}])
def test_convolutions(options, bias):
    data = pictures()
    model = adapted(Picture(**options), straight=True, target_modules=["conv"], n_components=2, n_nodes=3, **LINEAR)
    config, state, report = convert(model, data, bias=bias, ridge=1e-9)
    lora = as_lora(Picture(**options), config, state)
    with torch.no_grad():
        losses = [torch.stack([each(**batch)["loss"] for batch in data]).mean().item() for each in (model, lora)]
    assert losses == pytest.approx([report.loss_before, report.loss_after], rel=1e-5)
    if options["kernel_size"] == 1 and bias == "lora":
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    merged = lora.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**data[0])["logits"], model_logits(config, state, options, data), atol=1e-4, rtol=1e-4
        )


def model_logits(config, state, options, data):
    with torch.no_grad():
        return as_lora(Picture(**options), config, state)(**data[0])["logits"]


# What is said, refused, left alone


def test_a_loss_that_rises_is_said_with_the_modules():
    model = adapted(tiny.llama(), size=1.0, target_modules=["q_proj", "down_proj"], n_components=2, n_nodes=6)
    data = []
    for batch in DATA:  # labels that this very adapter finds most likely, so that another one does worse
        likely = logits(model, [batch]).argmax(dim=-1)
        data.append({**batch, "labels": torch.cat((batch["labels"][:, :1], likely[:, :-1]), dim=1)})
    with pytest.warns(UserWarning, match=r"as a LoRA the adapter has a loss of .* Least linear are 'model\.layers"):
        report = convert(model, data, max_rise=0.01)[2]
    assert report.loss_after > 1.01 * report.loss_before


def test_without_labels_there_are_no_losses():
    model = adapted(tiny.llama(), target_modules=["q_proj"], **LINEAR)
    report = convert(model, [{"input_ids": batch["input_ids"]} for batch in DATA])[2]
    assert report.loss_before is report.loss_after is None
    assert "loss" not in str(report)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, pixels):
        return self.conv(pixels)


REFUSED = {
    "a block": (tiny.llama, {"target_modules": ["mlp"]}, r"'model.layers.0.mlp': a LoRA cannot stand at a LlamaMLP"),
    "another norm": (
        tiny.llama,
        {"target_modules": ["input_layernorm"]},
        "'model.layers.0.input_layernorm': it is not the norm",
    ),
    "a source": (
        tiny.llama,
        {
            "target_modules": ["layers.1.mlp.down_proj"],
            "feature_source": {"down_proj": "model.layers.0"},
            "feature_sizes": {"down_proj": (16, 16)},
        },
        "'model.layers.1.mlp.down_proj': it reads the output of another module",
    ),
    "a layout": (
        tiny.llama,
        {"target_modules": ["q_proj"], "layout": "tokens"},
        "'model.layers.0.self_attn.q_proj': it has a layout or readout of its own",
    ),
    "groups": (Grouped, {"target_modules": ["conv"]}, "'conv': PEFT's LoRA knows no such groups"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_lora_is_refused_by_name(what, tmp_path):
    build, options, message = REFUSED[what]
    model = tiny.adapt(build(), **options)
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "lora", model, DATA)
    assert not (tmp_path / "lora").exists()


def test_a_norm_whose_output_is_not_what_the_output_layer_reads():
    base = tiny.llama()
    base.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    with pytest.raises(ValueError, match=r"does not read the output of 'model\.norm'"):
        convert(adapted(base, target_modules=["model.norm"]))


def test_wrong_arguments():
    model = adapted(tiny.llama(), target_modules=["q_proj"])
    for options, error, words in (
        ({"adapter_name": "nobody"}, ValueError, "adapter_name: the model has no LReg adapter 'nobody'"),
        ({"adapter_name": []}, ValueError, "adapter_name must name an adapter"),
        ({"bias": "all"}, ValueError, "bias must be"),
        ({"n_batches": 0}, ValueError, "n_batches must be at least 1"),
        ({"ridge": 0.0}, ValueError, "ridge must be positive"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"rank": 1.5}, ValueError, "rank must be"),
    ):
        with pytest.raises(error, match=words):
            convert(model, **options)
    with pytest.raises(ValueError, match="data are empty"):
        convert(model, [])
    with pytest.raises(ValueError, match="no LReg adapter"):
        convert(tiny.llama())


def test_the_model_stays_as_it_was():
    model = adapted(tiny.llama(), target_modules=["q_proj"], modules_to_save=["down_proj"])
    model.add_adapter(
        "other", LRegConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["down_proj"], **LINEAR)
    )
    tiny.shake(model, "other")
    model.set_adapter("default")
    model.base_model.model.model.layers[0].train()
    model.base_model.disable_adapter_layers()

    def everything():
        modules = list(model.modules())
        flags = [
            (getattr(m, "_active_adapter", None), getattr(m, "_disable_adapters", None), m.training) for m in modules
        ]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
        return copy.deepcopy(flags), hooks, [p.requires_grad for p in model.parameters()], tiny.state(model)

    before = everything()
    report = convert(model, adapter_name="other")[2]
    for old, new in zip(before[:3], everything()[:3], strict=True):
        assert old == new
    assert tiny.same_state(before[3], everything()[3])
    model.base_model.enable_adapter_layers()
    model.set_adapter("other")
    assert report.loss_before == pytest.approx(mean_loss(model.eval()), rel=1e-6)


def test_merging_refuses_and_names_the_way():
    with pytest.raises(NotImplementedError, match="save_as_lora"):
        adapted(tiny.llama(), target_modules=["q_proj"]).merge_and_unload()


def test_large_sums_take_several_passes(monkeypatch):
    model = adapted(tiny.llama(), target_modules=["q_proj", "down_proj", "lm_head"], **LINEAR)
    usual = convert(model)[1]
    monkeypatch.setattr(lreg_peft.export.lora, "_MOST_BYTES", 1)
    for key, value in convert(model)[1].items():
        assert torch.equal(value, usual[key])
