"""The tuner inside PEFT: adapters, batches, unloading, dtypes, compilation, Transformers' own entry points."""

import copy
import pickle

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny import (
    adapt,
    build,
    gpt2,
    gradients,
    inputs,
    layers,
    llama,
    loss_of,
    outputs,
    roberta,
    same_state,
    shake,
    state,
    trainable,
)
from torch import nn

from lreg_peft import LRegConfig, LRegLayer

PLACEMENTS = {
    "lm_head": {},
    "mlp": {"target_modules": ["mlp"]},
    "attn": {"target_modules": ["attn"]},
    "c_fc": {"target_modules": ["c_fc"]},
    "mlp and c_fc inside": {"target_modules": ["mlp", "mlp.c_fc"]},
    "activation": {"target_modules": ["act"], "feature_sizes": {"act": (64, 64)}},
    "whole layer": {"target_modules": r"transformer\.h\.\d"},
    "all-linear": {"target_modules": "all-linear"},
    "reduced weighting": {"weighting": "reduced", "n_nodes": 4},
    "factored weighting": {"weighting": "factored", "n_nodes": 4, "target_modules": ["mlp"]},
}
placements = pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)


def two_adapters(model: nn.Module | None = None) -> PeftModel:
    """GPT-2 with two different adapters on partly different modules; the first is active."""
    model = adapt(model or gpt2(), "one", n_components=2, n_nodes=3)
    model.add_adapter("two", LRegConfig(n_components=3, n_nodes=5, target_modules=["lm_head", "mlp"]))
    shake(model, "one", seed=1)
    shake(model, "two", seed=2)
    return model.eval()


class TestIdentity:
    @placements
    def test_starts_as_the_base_model(self, options):
        base = outputs(gpt2())
        assert torch.equal(outputs(adapt(gpt2(), **options)), base)

    @placements
    def test_trains_what_it_should_and_changes_the_output(self, options):
        model = adapt(gpt2(), **options)
        before, frozen = outputs(model), state(model.get_base_model())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):  # P and b learn from the second step on: coefficients start at zero
            model.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        assert not torch.equal(outputs(model), before)
        for name, value in state(model.get_base_model()).items():
            learns = "lreg_" in name and not name.endswith(".nodes")
            assert torch.equal(value, frozen[name]) != learns, name

    @placements
    def test_disabling_gives_the_base_model(self, options):
        base, model = outputs(gpt2()), adapt(gpt2(), **options)
        shake(model)
        adapted = outputs(model)
        assert not torch.allclose(adapted, base)
        with model.disable_adapter():
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), adapted)

    @placements
    def test_unloading_gives_the_base_model(self, options):
        original = gpt2()
        base, before = outputs(original), state(original)
        model = adapt(original, **options)
        shake(model)
        unloaded = model.unload()
        assert unloaded is original
        assert not layers(unloaded)
        assert same_state(state(unloaded), before)
        assert torch.equal(outputs(unloaded), base)
        assert not unloaded._forward_pre_hooks and not unloaded._forward_hooks
        assert torch.equal(outputs(adapt(unloaded, **options)), base)  # and it can be adapted again

    def test_unloading_restores_modules_to_save_too(self):
        original = roberta("SEQ_CLS")
        base = outputs(original)
        model = adapt(original, task_type="SEQ_CLS", modules_to_save=["classifier"])
        shake(model)
        assert torch.equal(outputs(model.unload()), base)


class TestSeveralAdapters:
    def test_switching(self):
        model, base = two_adapters(), outputs(gpt2())
        one = outputs(model)
        model.set_adapter("two")
        two = outputs(model)
        assert not torch.allclose(one, two)
        model.set_adapter("one")
        assert torch.equal(outputs(model), one)
        alone = adapt(gpt2(), "one", n_components=2, n_nodes=3)
        shake(alone, "one", seed=1)
        assert torch.equal(outputs(alone), one)
        with model.disable_adapter():
            assert torch.equal(outputs(model), base)

    def test_only_the_active_one_is_trainable(self):
        model = two_adapters()
        for active, other in (("one", "two"), ("two", "one")):
            model.set_adapter(active)
            learning = {name for name, p in model.named_parameters() if p.requires_grad}
            assert learning
            assert all(f".{active}." in name for name in learning), other

    def test_sizes_differ(self):
        (head,) = [layer for layer in layers(two_adapters()) if layer.out_features == 61]
        assert head.lreg_encoder["one"].nodes.shape == (2, 3)
        assert head.lreg_encoder["two"].nodes.shape == (3, 5)

    def test_both_active_on_one_layer_add_up(self):
        model = two_adapters()
        base = gpt2()
        captured = {}
        head = model.get_base_model().lm_head
        head.register_forward_hook(lambda module, args, result: captured.update(x=args[0]))
        model.base_model.set_adapter(["one", "two"])
        both = outputs(model)
        expected = base.lm_head(captured["x"])
        for name in ("one", "two"):
            expected = expected + head.shortcut(name, captured["x"], expected)
        assert torch.equal(both, expected)

    def test_deleting(self):
        model = two_adapters()
        one = outputs(model)
        model.set_adapter("two")
        model.delete_adapter("one")
        assert list(model.peft_config) == ["two"]
        assert not [name for name in model.state_dict() if ".one." in name]
        two = outputs(model)
        assert not torch.allclose(one, two)
        model.add_adapter("one", LRegConfig(n_components=2, n_nodes=4, target_modules=["lm_head"]))
        assert torch.equal(outputs(model), two)

    def test_deleting_the_active_one_warns_and_switches(self):
        model = two_adapters()
        with pytest.warns(UserWarning, match="one was active"):
            model.delete_adapter("one")
        assert model.active_adapters == ["two"]

    def test_adding_under_a_taken_name_is_refused(self):
        model = two_adapters()
        before = state(model)
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("one", LRegConfig(target_modules=["attn"]))
        assert same_state(state(model), before)

    def test_all_linear_twice(self):
        model = adapt(gpt2(), "one", target_modules="all-linear")
        first = {name for name, module in model.named_modules() if isinstance(module, LRegLayer)}
        model.add_adapter("two", LRegConfig(target_modules="all-linear", n_nodes=3))
        second = {name for name, module in model.named_modules() if isinstance(module, LRegLayer)}
        assert first == second
        assert all(set(layer.lreg_encoder) == {"one", "two"} for layer in layers(model))
        assert len(first) == 8  # c_attn, c_proj, c_fc, c_proj in two layers; not the output head

    def test_inner_module_first_then_the_block_around_it(self):
        model = adapt(gpt2(), "inner", target_modules=["mlp.c_fc"])
        model.add_adapter("outer", LRegConfig(target_modules=["attn"]))
        shake(model, "inner", seed=1)
        shake(model, "outer", seed=2)
        inner = outputs(model)
        model.set_adapter("outer")
        assert not torch.equal(outputs(model), inner)

    def test_module_inside_a_wrapped_block_is_refused_and_nothing_changes(self):
        model = adapt(gpt2(), target_modules=["mlp"])
        before = state(model)
        with pytest.raises(ValueError, match=r"'transformer.h.0.mlp.*' lies inside a block that already carries"):
            model.add_adapter("inner", LRegConfig(target_modules=["c_fc"]))
        assert same_state(state(model), before)
        assert list(model.peft_config) == ["default"]


class TestMixedBatch:
    def expected(self, model, names):
        rows = []
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(outputs(model)[i])
            else:
                model.set_adapter(name)
                rows.append(outputs(model)[i])
        return torch.stack(rows)

    @pytest.mark.parametrize(
        "names", [["one", "__base__", "two"], ["two", "two", "one"], ["__base__"] * 3, ["one"] * 3]
    )
    def test_equals_single_adapter_runs(self, names):
        model = two_adapters()
        expected = self.expected(model, names)
        model.set_adapter("one")
        mixed = outputs(model, adapter_names=names)
        # The same numbers, but products of another batch size may add up in another order: 64 terms at the most.
        assert (mixed - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert model.active_adapters == ["one"]
        assert torch.equal(outputs(model), self.expected(model, ["one"] * 3))

    def test_base_rows_are_exactly_the_base_model(self):
        model, base = two_adapters(), outputs(gpt2())
        assert torch.equal(outputs(model, adapter_names=["__base__"] * 3), base)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate(self, beams):
        model = two_adapters()
        names, batch = ["two", "__base__", "one"], inputs(gpt2())
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        together = model.generate(**batch, adapter_names=names, **options)
        for i, name in enumerate(names):
            single = {key: value[i : i + 1] for key, value in batch.items()}
            alone = model.generate(**single, adapter_names=[name], **options)
            assert torch.equal(together[i : i + 1], alone)

    def test_modules_to_save_follow_their_sample(self):
        model = adapt(build("bert", "SEQ_CLS"), "one", task_type="SEQ_CLS", n_components=1)
        model.add_adapter("two", LRegConfig(preset="paper", task_type="SEQ_CLS"))
        wrapper = model.get_base_model().classifier
        for i, name in enumerate(("one", "two")):
            shake(model, name, seed=i)
            for parameter in wrapper.modules_to_save[name].parameters():
                parameter.data.add_(i + 1.0)
        names = ["two", "one", "__base__"]
        expected = self.expected(model.eval(), names)
        mixed = outputs(model, adapter_names=names)
        assert (mixed - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()

    def test_wrong_use_is_refused(self):
        model = two_adapters()
        with pytest.raises(ValueError, match=r"\['three'\] do not exist.*'one', 'two'"):
            outputs(model, adapter_names=["one", "three", "two"])
        with pytest.raises(ValueError, match="2 entries, but a batch of 3"):
            outputs(model, adapter_names=["one", "two"])
        model.train()
        with pytest.raises(ValueError, match=r"eval mode only.*model.eval\(\)"):
            model(**inputs(gpt2()), adapter_names=["one", "one", "two"])
        with pytest.raises(IndexError):
            model.eval()(input_ids=torch.full((3, 4), 10**6), adapter_names=["one", "one", "two"])
        assert torch.equal(outputs(model), self.expected(model, ["one"] * 3))  # nothing is left of these


class TestMergingIsRefused:
    @pytest.mark.parametrize(
        "call",
        [
            lambda m: m.merge_adapter(),
            lambda m: m.merge_and_unload(),
            lambda m: m.merge_and_unload(safe_merge=True, adapter_names=["one"]),
            lambda m: m.unmerge_adapter(),
        ],
        ids=["merge_adapter", "merge_and_unload", "safe", "unmerge_adapter"],
    )
    def test_before_anything_changes(self, call):
        model = two_adapters()
        before, logits = state(model), outputs(model)
        with pytest.raises(NotImplementedError, match=r"cannot be merged: .*nonlinear.*unload\(\)"):
            call(model)
        assert same_state(state(model), before)
        assert torch.equal(outputs(model), logits)
        assert model.active_adapters == ["one"]

    def test_also_when_a_trained_module_comes_first(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model = adapt(net, target_modules=["1"], modules_to_save=["0"])
        before = state(model)
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            model.merge_and_unload()
        assert same_state(state(model), before)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @placements
    def test_half_precision_base(self, options, dtype):
        base = gpt2().to(dtype)
        expected = outputs(base)
        model = adapt(base, **options)
        assert torch.equal(outputs(model), expected)
        shake(model)
        assert outputs(model).dtype == dtype
        assert torch.isfinite(outputs(model)).all()
        found = gradients(model)
        assert found
        assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in found.values())
        assert all(layer.lreg_encoder["default"].nodes.dtype == torch.float32 for layer in layers(model))

    @pytest.mark.parametrize(("cast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
    @placements
    def test_dtype_of_adapter_parameters(self, options, cast, expected):
        model = get_peft_model(
            gpt2().to(torch.bfloat16), LRegConfig(preset="paper", **options), autocast_adapter_dtype=cast
        )
        assert {p.dtype for name, p in model.named_parameters() if "lreg_" in name} == {expected}

    @pytest.mark.parametrize("autocast", [False, True])
    def test_nodes_of_a_second_adapter_stay_fp32(self, autocast):
        model = adapt(gpt2().to(torch.bfloat16), n_nodes=5)
        model.add_adapter("two", LRegConfig(preset="paper", n_nodes=7), autocast_adapter_dtype=autocast)
        model.to(torch.bfloat16)
        model.half()
        (head,) = layers(model)
        assert head.lreg_encoder["default"].nodes.dtype == head.lreg_encoder["two"].nodes.dtype == torch.float32
        assert torch.equal(head.lreg_encoder["two"].nodes[0], torch.linspace(0, 1, 7))

    def test_autocast(self):
        model = adapt(gpt2())
        shake(model)
        exact = outputs(model)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = outputs(model)
            loss_of(model).backward()
        assert rounded.dtype == torch.bfloat16
        # bf16 keeps 8 bits; two layers and a head of 16 to 64 terms each lose a few of them.
        assert (rounded - exact).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        (head,) = layers(model)
        assert all(p.grad.dtype == torch.float32 for p in head.parameters() if p.requires_grad)

    def test_float64_model_is_exact_in_float64(self):
        model = adapt(gpt2().double(), n_nodes=5)
        shake(model)
        (head,) = layers(model)
        head.double()
        assert head.lreg_encoder["default"].nodes.dtype == torch.float32  # nodes keep their precision, up or down
        single = adapt(gpt2(), n_nodes=5)
        shake(single)
        assert outputs(model).dtype == torch.float64
        difference = (outputs(model) - outputs(single)).abs().max()
        assert 0 < difference <= 256 * torch.finfo(torch.float32).eps * outputs(single).abs().max()


class TestCompile:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({}, id="lm_head"),
            pytest.param({"target_modules": ["mlp"], "n_nodes": 20}, id="mlp", marks=pytest.mark.slow),
        ],
    )
    def test_same_result_and_no_recompilation_when_nodes_move(self, options):
        torch._dynamo.reset()
        model = adapt(gpt2(n_layer=1), **{"n_nodes": 5, **options})
        shake(model)
        batch = inputs(gpt2())
        with torch.no_grad():
            expected = model(**batch, use_cache=False).logits
        graphs = []

        def backend(graph, examples):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, backend=backend)
        with torch.no_grad():
            result = compiled(**batch, use_cache=False).logits
            compiled_once = len(graphs)
            assert compiled_once >= 1
            # Compilers get single operations and eager mode fused ones: roundings of u over the length of an element.
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            for layer in layers(model):
                layer.lreg_encoder["default"].nodes.copy_(layer.lreg_encoder["default"].nodes.square())
            moved = compiled(**batch, use_cache=False).logits
            assert len(graphs) == compiled_once
            assert not torch.allclose(moved, expected)
            torch.testing.assert_close(moved, model(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()

    def test_training_step(self):
        torch._dynamo.reset()
        found = []
        for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
            model = adapt(gpt2(n_layer=1))
            shake(model)
            wrap(model)(**inputs(gpt2())).logits.square().mean().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        eager, compiled = found
        assert eager.keys() == compiled.keys()
        for name, gradient in eager.items():
            # Sums over 27 tokens and 61 words, in another order.
            limit = 128 * torch.finfo(torch.float32).eps * gradient.abs().max()
            assert (gradient - compiled[name]).abs().max() <= limit
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({}, id="lm_head", marks=pytest.mark.slow),
            pytest.param({"target_modules": ["mlp"], "n_nodes": 12}, id="mlp"),
        ],
    )
    def test_graph_stays_whole(self, options):
        torch._dynamo.reset()
        batch = inputs(gpt2())
        explanation = torch._dynamo.explain(adapt(gpt2(n_layer=1), **options))(**batch, use_cache=False)
        assert explanation.graph_break_count == 0, explanation.break_reasons
        torch._dynamo.reset()


class TestCopies:
    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @placements
    def test_copy_is_equal_and_independent(self, options, clone):
        model = adapt(gpt2(), **options)
        shake(model)
        before = outputs(model)
        twin = clone(model)
        assert torch.equal(outputs(twin), before)
        shake(twin, seed=5)
        assert not torch.equal(outputs(twin), before)
        assert torch.equal(outputs(model), before)
        twin.get_base_model().tie_weights()
        assert torch.equal(outputs(twin.unload()), outputs(gpt2()))
        assert torch.equal(outputs(model), before)


class TestEntryPoints:
    def test_status(self):
        model = two_adapters()
        status = model.get_model_status()
        assert status.adapter_model_type == "LRegModel"
        assert status.peft_types == {"one": "LREG", "two": "LREG"}
        assert status.trainable_params == trainable(model)
        assert status.num_adapter_layers == 3
        assert status.active_adapters == ["one"]
        assert status.available_adapters == ["one", "two"]
        assert status.enabled is True
        assert status.merged_adapters == []
        assert status.devices == {"one": ["cpu"], "two": ["cpu"]}
        by_name = {layer.name: layer for layer in model.get_layer_status()}
        assert by_name["model.lm_head"].available_adapters == ["one", "two"]
        assert by_name["model.transformer.h.0.mlp"].available_adapters == ["two"]
        assert by_name["model.lm_head"].requires_grad == {"one": True, "two": False}

    def test_inject_adapter_in_model(self):
        model, base = gpt2(), outputs(gpt2())
        same = inject_adapter_in_model(LRegConfig(preset="paper", task_type="CAUSAL_LM"), model)
        assert same is model
        assert torch.equal(outputs(model), base)
        shake(model)
        assert not torch.allclose(outputs(model), base)
        assert trainable(model) == (16 + 1) * 2 + 2 * 2 * 61

    def test_native_add_adapter(self):
        model, base = gpt2(), outputs(gpt2())
        model.add_adapter(LRegConfig(preset="paper", n_components=1), adapter_name="one")
        with pytest.warns(UserWarning, match="multiple adapters in the model"):  # of every method
            model.add_adapter(LRegConfig(target_modules=["mlp"]), adapter_name="two")
        for i, name in enumerate(("one", "two")):
            shake(model, name, seed=i)
        model.set_adapter("one")
        one = outputs(model)
        model.set_adapter("two")
        assert not torch.allclose(outputs(model), one)
        model.disable_adapters()
        assert torch.equal(outputs(model), base)
        model.enable_adapters()
        model.set_adapter("one")
        assert torch.equal(outputs(model), one)
        model.delete_adapter("two")
        assert torch.equal(outputs(model), one)

    def test_model_is_tagged(self):
        assert "lreg" in adapt(gpt2()).get_base_model().model_tags

    def test_config_given_is_not_needed_again(self):
        """The same configuration object serves two models of different layouts."""
        config = LRegConfig(preset="paper")
        get_peft_model(gpt2(), copy.deepcopy(config))
        get_peft_model(roberta(), copy.deepcopy(config))


class TestWholeSubmodules:
    def test_attention_block_with_tuple_output(self):
        model = adapt(gpt2(), target_modules=["attn"])
        shake(model)
        result = model(**inputs(gpt2()), use_cache=True)
        assert result.past_key_values.get_seq_length() == 9
        cached = model.generate(**inputs(gpt2()), max_new_tokens=5, do_sample=False, use_cache=True)
        plain = model.generate(**inputs(gpt2()), max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)

    def test_module_called_with_keywords_only(self):
        """Llama calls self_attn(hidden_states=..., position_embeddings=..., ...)."""
        base, model = outputs(llama()), adapt(llama(), target_modules=["self_attn"])
        assert torch.equal(outputs(model), base)
        shake(model)
        assert not torch.allclose(outputs(model), base)

    def test_classification_head_as_a_target(self):
        with pytest.warns(UserWarning, match="'classifier' is in target_modules.*If it is newly drawn, take it out"):
            model = adapt(roberta("SEQ_CLS"), task_type="SEQ_CLS", target_modules=["classifier"])
        (head,) = layers(model)
        assert type(head.base_layer).__name__ == "RobertaClassificationHead"
        assert "classifier" not in model.peft_config["default"].modules_to_save  # PEFT would train it in full
        assert trainable(model) == (16 + 1) * 2 + 2 * 2 * 2
        base = outputs(roberta("SEQ_CLS"))
        shake(model)
        assert not torch.allclose(outputs(model), base)

    def test_strided_stage_of_a_resnet(self):
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        base = transformers.ResNetForImageClassification(config).eval()
        images = torch.randn(2, 3, 32, 32)
        expected = base(images).logits
        model = adapt(base, target_modules=["encoder.stages.1"], feature_sizes={"stages.1": (4, 8)})
        model.eval()
        assert torch.equal(model(images).logits, expected)
        shake(model)
        assert not torch.allclose(model(images).logits, expected)
