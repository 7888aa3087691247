"""Targeting the output head: tying, saving, generating, resizing, fused losses."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tiny import adapt, build, gpt2, inputs, layers, llama, outputs, roberta, same_state, shake, state

from lreg_peft import LRegConfig

BUILDERS = {
    "gpt2": gpt2,
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "roberta": roberta,
    "bert": lambda: build("bert", "MASKED_LM"),
    "t5": lambda: build("t5", "SEQ_2_SEQ_LM"),
    "opt": lambda: build("opt", "CAUSAL_LM"),
}
heads = pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)


def is_tied(model: transformers.PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


class TestTying:
    @heads
    def test_tie_weights_after_wrapping(self, builder):
        base = builder()
        tied = is_tied(base)
        model = adapt(base)
        shake(model)
        before, weights = outputs(model), state(model)
        base.tie_weights()
        assert is_tied(base) == tied
        assert torch.equal(outputs(model), before)
        assert same_state(state(model), weights)

    @pytest.mark.parametrize("builder", [gpt2, roberta, BUILDERS["tied llama"]])
    def test_tying_is_done_and_not_only_tolerated(self, builder):
        base = builder()
        adapt(base)
        base.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(61, 16))
        assert not is_tied(base)
        base.tie_weights()
        assert is_tied(base)
        assert base.get_output_embeddings().weight.abs().sum() > 0

    @heads
    def test_unloading_restores_the_tying(self, builder):
        base = builder()
        keys, expanded = copy.deepcopy(base._tied_weights_keys), copy.deepcopy(base.all_tied_weights_keys)
        expected, tied = outputs(base), is_tied(base)
        model = adapt(base)
        model.add_adapter("second", LRegConfig(preset="paper", n_nodes=4))
        base = model.unload()
        assert base._tied_weights_keys == keys
        assert base.all_tied_weights_keys == expanded
        assert "_tied_weights_keys" not in base.__dict__
        base.tie_weights()
        assert is_tied(base) == tied
        assert torch.equal(outputs(base), expected)

    @heads
    def test_unloaded_model_saves_and_loads(self, builder, tmp_path):
        base = adapt(builder()).unload()
        base.save_pretrained(tmp_path)
        assert torch.equal(outputs(type(base).from_pretrained(tmp_path).eval()), outputs(builder()))


class TestSaving:
    @heads
    def test_file_holds_the_adapter_alone(self, builder, tmp_path):
        model = adapt(builder(), n_nodes=4)
        shake(model)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {name.partition("lreg_")[2] for name in saved} == {
            "projection.weight",
            "projection.bias",
            "coefficients.weight",
            "encoder.nodes",
        }
        loaded = PeftModel.from_pretrained(builder(), tmp_path)
        assert torch.equal(outputs(loaded), outputs(model))

    def test_asking_for_the_embedding_still_saves_it(self, tmp_path):
        adapt(gpt2()).save_pretrained(tmp_path, save_embedding_layers=True)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert "base_model.model.lm_head.base_layer.weight" in saved

    def test_leaving_it_out_on_request(self, tmp_path):
        adapt(gpt2()).save_pretrained(tmp_path, save_embedding_layers=False)
        assert all("lreg_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))

    def test_trained_tokens_save_their_rows_alone(self, tmp_path):
        adapt(gpt2(), trainable_token_indices=[3, 4]).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        other = {name: value for name, value in saved.items() if "lreg_" not in name}
        assert [tuple(value.shape) for value in other.values()] == [(2, 16)]

    def test_base_model_saves_without_the_adapter_in_the_way(self, tmp_path):
        base = gpt2()
        expected = outputs(base)
        model = adapt(base)
        shake(model)
        adapted = outputs(model)
        model.unload().save_pretrained(tmp_path)
        assert torch.equal(outputs(transformers.GPT2LMHeadModel.from_pretrained(tmp_path)), expected)
        assert not torch.allclose(adapted, expected)


class TestGeneration:
    @pytest.mark.parametrize("builder", [gpt2, llama, BUILDERS["opt"], BUILDERS["t5"]])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_cache_makes_no_difference(self, builder, beams):
        model = adapt(builder()).eval()
        plain = model.generate(**inputs(builder()), max_new_tokens=8, num_beams=beams, do_sample=False)
        shake(model)
        batch = {k: v for k, v in inputs(builder()).items() if k != "decoder_input_ids"}
        options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        cached = model.generate(**batch, **options, use_cache=True)
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
        assert not torch.equal(cached, plain)

    @heads
    def test_output_embeddings_are_those_of_the_base(self, builder):
        base = builder()
        before = base.get_output_embeddings()
        model = adapt(base)
        after = model.get_base_model().get_output_embeddings()
        assert after.weight is before.weight
        assert model.get_input_embeddings() is base.get_input_embeddings()


class TestResizing:
    @heads
    def test_before_wrapping(self, builder):
        model = builder()
        model.resize_token_embeddings(70, mean_resizing=False)
        base = outputs(model)
        model = adapt(model)
        assert torch.equal(outputs(model), base)
        shake(model)
        (head,) = layers(model)
        assert head.out_features == outputs(model).shape[-1] == 70

    @pytest.mark.parametrize("name", ["gpt2", "tied llama", "bert", "t5"])
    def test_new_tokens_are_saved_with_the_adapter(self, name, tmp_path):
        """New rows start at random, so the base model alone cannot bring them back."""
        builder = BUILDERS[name]
        builder().save_pretrained(tmp_path / "base")

        def resized(seed):
            model = type(builder()).from_pretrained(tmp_path / "base").eval()
            torch.manual_seed(seed)
            model.resize_token_embeddings(70, mean_resizing=False)
            return model

        model = adapt(resized(1))
        shake(model)
        with pytest.warns(UserWarning, match="embedding layer has been resized"):
            model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(resized(2), tmp_path / "adapter").eval()
        ids = torch.arange(60, 70).unsqueeze(0)
        batch = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
        assert not torch.equal(resized(2)(**batch).logits, resized(1)(**batch).logits)

    @pytest.mark.parametrize("name", ["gpt2", "tied llama", "roberta", "bert", "opt"])
    def test_after_wrapping_the_next_pass_says_that_the_adapter_is_lost(self, name):
        model = adapt(BUILDERS[name]())
        model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
        with pytest.raises(RuntimeError, match=r"replaced or resized .* lost. Resize the embeddings first"):
            outputs(model)

    def test_to_the_present_size_is_no_resizing(self):
        model = adapt(gpt2())
        embedding = model.get_base_model().get_input_embeddings()
        assert model.resize_token_embeddings() is embedding
        assert model.resize_token_embeddings(61) is embedding

    def test_after_unloading_works(self):
        base = adapt(gpt2()).unload()
        base.resize_token_embeddings(70, mean_resizing=False)
        assert outputs(base).shape[-1] == 70

    def test_other_placements_do_not_mind(self):
        model = adapt(gpt2(), target_modules=["mlp"])
        model.resize_token_embeddings(70, mean_resizing=False)
        assert outputs(model).shape[-1] == 70


class FusedLoss(transformers.GPT2LMHeadModel):
    """Computes logits from the weight of its head, as fused cross-entropy kernels do."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.transformer(input_ids).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class TestFusedLoss:
    def model(self, **options):
        base = FusedLoss(gpt2().config)
        base.load_state_dict(gpt2().state_dict())
        return adapt(base, **{"task_type": "CAUSAL_LM", **options}).eval()

    def test_passing_by_the_head_is_an_error(self):
        model = self.model()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"without calling its output layer.*use_liger_kernel=False"):
                model(inputs(gpt2())["input_ids"])

    def test_an_earlier_call_of_the_head_does_not_count(self):
        model = self.model()
        model.get_base_model().lm_head(torch.randn(1, 16))
        with pytest.raises(RuntimeError, match="without calling its output layer"):
            model(inputs(gpt2())["input_ids"])

    def test_disabled_or_other_adapters_are_none_of_its_business(self):
        ids = inputs(gpt2())["input_ids"]
        model = self.model()
        with model.disable_adapter():
            model(ids)
        self.model(target_modules=["mlp"])(ids)
        model.add_adapter("elsewhere", LRegConfig(target_modules=["mlp"]))
        model.set_adapter("elsewhere")
        model(ids)

    def test_unloading_ends_the_check(self):
        self.model().unload()(inputs(gpt2())["input_ids"])

    def test_normal_models_pass_again_and_again(self):
        model = adapt(gpt2())
        assert torch.equal(outputs(model), outputs(model))

    def test_a_pass_that_begins_in_another_thread_takes_nothing_away(self):
        model = adapt(gpt2()).eval()
        expected = outputs(model)
        begun, go_on, others = threading.Event(), threading.Event(), []

        def begin_another(module, args, output):
            if threading.current_thread() is threading.main_thread():
                others.append(threads.submit(outputs, model))
                assert begun.wait(10)

        def wait(module, args):
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                assert go_on.wait(10)

        model.get_base_model().lm_head.register_forward_hook(begin_another)
        model.get_base_model().transformer.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as threads:
            try:
                assert torch.equal(outputs(model), expected)
            finally:
                go_on.set()
            assert torch.equal(others[0].result(), expected)

    def test_a_head_that_is_compiled_by_itself_is_seen(self):
        torch._dynamo.reset()
        model = adapt(gpt2())
        expected = outputs(model)
        model.get_base_model().lm_head.compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(outputs(model), expected)
