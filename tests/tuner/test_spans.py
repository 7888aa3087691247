"""Shortcuts that read another module's output."""

import copy
import pickle
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapt, gpt2, image_model, inputs, layers, shake, state
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lreg_peft import LRegConfig, initialize_lreg_weights, inspect_targets

SPAN = {"target_modules": ["last"], "feature_source": {"last": "first"}, "n_components": 3, "n_nodes": 4}


class Net(nn.Module):
    """first -> middle -> last, each of which may be checkpointed, alone or together."""

    def __init__(self, checkpointed: tuple[str, ...] = (), reentrant: bool = False):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 7)
        self.checkpointed, self.reentrant = checkpointed, reentrant
        self.skip = False

    def forward(self, x):
        steps = ["first", "middle", "last"] if not self.skip else ["middle", "last"]
        x = functional.pad(x, (0, 2)) if self.skip else x
        for name in steps:
            block = getattr(self, name)
            x = checkpoint(block, x, use_reentrant=self.reentrant) if name in self.checkpointed else block(x)
            x = torch.tanh(x) if name != "last" else x
        return x


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net(**options)


def spanned(base: nn.Module, **options):
    model = get_peft_model(base, LRegConfig(preset="paper", **{**SPAN, **options}))
    shake(model)
    return model


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def test_reads_the_output_of_the_source():
    base = net()
    before = base(X)
    model = get_peft_model(copy.deepcopy(base), LRegConfig(preset="paper", **SPAN))
    assert torch.equal(model(X), before)
    shake(model)
    (layer,) = layers(model)
    assert (layer.in_features, layer.out_features) == (6, 7)
    assert layer.lreg_projection["default"].weight.shape == (3, 6)
    value = layer.design("default", base.first(X)) @ layer.table("default")
    torch.testing.assert_close(model(X), before + value)


def test_span_over_a_change_of_size():
    base, batch = image_model("mobilenet_v2")
    model = adapt(copy.deepcopy(base))
    (layer,) = layers(model)
    assert layer.source.name == "mobilenet_v2.layer.8"
    shake(model)
    seen, after = [], []
    base.mobilenet_v2.layer[8].register_forward_hook(lambda m, a, out: seen.append(out))
    base.mobilenet_v2.conv_1x1.register_forward_hook(lambda m, a, out: after.append(out))
    layer.register_forward_hook(lambda m, a, out: after.append(out))
    with torch.no_grad():
        base(pixel_values=batch["pixel_values"])
        model.eval()(pixel_values=batch["pixel_values"])
        rows = layer.design("default", seen[0].movedim(1, -1)) @ layer.table("default")
    expected = after[0] + functional.avg_pool2d(rows.movedim(-1, 1), 2)
    # Sums of a few products of the size of the largest value, in another order.
    torch.testing.assert_close(after[1], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's: the base is frozen
class TestCheckpointing:
    """Backward repeats parts of the pass by themselves; a part without the source has nothing to read."""

    SENTENCE = r"around 'last' reads the output of feature_source 'first'.*checkpointing.*cannot be used"

    def step(self, *checkpointed, reentrant):
        model = spanned(net(checkpointed=checkpointed, reentrant=reentrant)).train()
        model(X.clone().requires_grad_()).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("others", [(), ("first",), ("first", "middle")])
    def test_of_the_shortcut_is_refused(self, others, reentrant):
        with pytest.raises(RuntimeError, match=self.SENTENCE):
            self.step(*others, "last", reentrant=reentrant)

    def test_of_other_parts_changes_nothing(self, reentrant):
        expected, found = self.step(reentrant=False), self.step("middle", reentrant=reentrant)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_what_an_interrupted_pass_left_is_not_read():
    model = spanned(net())
    inner = model.base_model.model

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = inner.middle.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    inner.skip = True
    with pytest.raises(RuntimeError, match="has not run before it in this forward pass"):
        model(X)


def test_threads_have_their_own_passes():
    model = spanned(net()).eval()
    other_is_done = []

    def run_another(module, args):
        if not other_is_done:
            other_is_done.append(True)
            thread = threading.Thread(target=lambda: other_is_done.append(model(-X)))
            thread.start()
            thread.join()

    expected = model(X), model(-X)
    model.base_model.model.middle.register_forward_pre_hook(run_another)
    assert torch.equal(model(X), expected[0])
    assert torch.equal(other_is_done[1], expected[1])


def test_gradients_pass_through_the_source():
    """The output of the source with its own shortcut, though that was added with it."""
    model = spanned(net(), target_modules=["first", "last"])
    first, last = layers(model)
    hidden = first(X)
    value = last.design("default", hidden) @ last.table("default")
    base = last.base_layer(torch.tanh(model.base_model.model.middle(torch.tanh(hidden))))
    torch.testing.assert_close(model(X), base + value)
    last.base_layer.weight.data.zero_()  # what is left depends on the first shortcut through the span alone
    model(X).square().sum().backward()
    assert first.lreg_coefficients["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_into_one_graph(backend):
    model = spanned(net())
    expected = model(X)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        result = compiled(X)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
    for name, value in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value)


def test_a_pass_without_the_source_is_an_error_and_takes_nothing_old():
    for train in (True, False):
        model = spanned(net()).train(train)
        model(X)
        model.base_model.model.skip = True
        with pytest.raises(RuntimeError, match="'last' reads the output of feature_source 'first', which has not run"):
            model(X)
        model.base_model.model.skip = False
        model(X)


def test_source_that_runs_after_the_target():
    class Backwards(Net):
        def forward(self, x):
            return self.last(functional.pad(x, (0, 1))) + self.first(x).sum()

    with torch.random.fork_rng():
        base = Backwards()
    with pytest.raises(ValueError, match="'last': its feature_source 'first' has not run before it"):
        inspect_targets(base, LRegConfig(preset="paper", **SPAN), example_inputs=X)
    model = spanned(base)
    with pytest.raises(RuntimeError, match="has not run before it in this forward pass"):
        model(X)
    with pytest.raises(RuntimeError, match="has not run before it in this forward pass"):
        model(X)  # what the first pass left behind is of that pass ...


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fisrt", "must name one module, and 'fisrt' names none. Did you mean 'first'"),
        ("last", "'last', which has not run before it: it contains it"),
        ("0", r"'0' names 2: 'one.0', 'two.0'"),
    ],
)
def test_names_that_cannot_be(source, message):
    base = net()
    base.one, base.two = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    before = state(base)
    config = {**SPAN, "feature_source": {"last": source}}
    for call in (
        lambda: inspect_targets(base, LRegConfig(preset="paper", **config)),
        lambda: get_peft_model(base, LRegConfig(preset="paper", **config)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert state(base).keys() == before.keys()


def test_an_embedding_has_its_width_to_read():
    base = gpt2().eval()
    config = LRegConfig(target_modules=["mlp"], feature_source={"mlp": "transformer.wte"}, n_components=3, n_nodes=4)
    batch = inputs("gpt2")
    report = inspect_targets(base, config, example_inputs={"input_ids": batch["input_ids"]})
    width = base.config.n_embd
    assert {(t.in_features, t.out_features) for t in report} == {(width, width)}
    model = get_peft_model(base, config)
    before = model(input_ids=batch["input_ids"]).logits
    shake(model)
    assert not torch.allclose(model(input_ids=batch["input_ids"]).logits, before)


def test_a_key_without_effect_warns():
    with pytest.warns(UserWarning, match=r"feature_source keys \['lsat'\] match no adapted module"):
        inspect_targets(net(), LRegConfig(target_modules=["last"], feature_source={"lsat": "first"}))


def test_adapters_of_a_module_have_one_source():
    model = spanned(net())
    model.add_adapter("same", LRegConfig(preset="paper", **SPAN))
    with pytest.raises(ValueError, match=r"'last' has the adapters 'default', 'same', which read first"):
        model.add_adapter("other", LRegConfig(target_modules=["last"]))
    assert list(model.peft_config) == ["default", "same"]
    model(X)


def test_a_module_that_has_no_adapter_left_may_get_another_source():
    model = spanned(net())
    model.delete_adapter("default")
    model.add_adapter("other", LRegConfig(target_modules=["last"], n_components=3, n_nodes=4))
    model.set_adapter("other")
    (layer,) = layers(model)
    assert layer.in_features == 5
    shake(model, "other")
    model(X)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_read_their_own_source(clone):
    model = spanned(net()).train()
    expected = model(X)  # leaves an output of the source in the model
    twin = clone(model)
    with torch.no_grad():
        twin.base_model.model.first.weight.zero_()
    assert not torch.allclose(twin(X), expected)
    assert torch.equal(model(X), expected)


def test_saved_loaded_and_unloaded(tmp_path):
    base = net()
    before = base(X)
    model = spanned(copy.deepcopy(base))
    expected = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(X), expected)
    plain = loaded.unload()
    assert torch.equal(plain(X), before)
    assert not plain.first._forward_hooks


def test_start_from_data_sees_the_source():
    model = get_peft_model(net(), LRegConfig(preset="paper", **SPAN))
    inner = model.base_model.model

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return type("Output", (), {"loss": self.inner(x).square().sum()})()

    wrapper = WithLoss()
    for method in ("pca", "gradient"):
        initialize_lreg_weights(wrapper, [{"x": X}], method=method, show_progress=False)
        (layer,) = layers(model)
        coords = layer.coords("default", inner.first(X))
        # Standardised on these very rows: near one half in the mean, spread over most of (0, 1).
        assert (coords.mean(dim=0) - 0.5).abs().max() < 0.15
        assert (coords.max(dim=0).values - coords.min(dim=0).values).min() > 0.5
