"""What trainers, engines and servers do to an adapted model beside calling it; what importing the package does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from peft import get_peft_model, helpers
from peft.utils.other import fsdp_auto_wrap_policy
from processes import run_program
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lreg_peft import LRegConfig

IDS = torch.arange(3, 30).view(3, 9)
PLACES = {"target_modules": ["mlp", "c_attn", "lm_head"], "n_nodes": 4}


def adapted(**options):
    model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", **{**PLACES, **options})).train()
    tiny.shake(model)
    return model


def gradients(model, loss=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    (output.loss if loss is None else loss(output.logits)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


class InPlace(torch.autograd.Function):
    """Cross-entropy that writes its gradient over the logits, as Liger's and flash-attention's kernels do."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.no_grad():
            probabilities = logits.float().softmax(dim=-1)
            loss = -probabilities.gather(1, labels.unsqueeze(1)).log().mean()
            probabilities.scatter_add_(1, labels.unsqueeze(1), torch.full_like(probabilities[:, :1], -1.0))
            logits.copy_(probabilities / len(labels))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return logits * gradient, None


class TestLossesThatWriteOverTheLogits:
    @staticmethod
    def plain(logits):
        return nn.functional.cross_entropy(logits[:, :-1].float().reshape(-1, 61), IDS[:, 1:].reshape(-1))

    @staticmethod
    def in_place(logits):
        return InPlace.apply(logits[:, :-1].reshape(-1, 61), IDS[:, 1:].reshape(-1))

    @pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
    def test_train_like_the_plain_one(self, weighting):
        assert_same(gradients(adapted(**weighting), self.in_place), gradients(adapted(**weighting), self.plain))

    def test_over_the_logits_themselves(self):
        """Not over a copy of some rows: what the shortcut has returned is overwritten."""

        def whole(logits):
            return InPlace.apply(logits.view(-1, 61), IDS.view(-1))

        expected = gradients(adapted(), lambda logits: nn.functional.cross_entropy(logits.view(-1, 61), IDS.view(-1)))
        assert_same(gradients(adapted(), whole), expected)

    def test_in_half_precision(self):
        found = []
        for loss in (self.in_place, self.plain):
            model = adapted()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(gradients(model, loss))
        # One rounding of the gradient in the logits to bf16, or of its parts.
        for name, gradient in found[1].items():
            assert (found[0][name] - gradient).abs().max() <= 0.05 * gradient.abs().max(), name

    def test_as_the_loss_function_of_the_model(self):
        expected = gradients(adapted())
        model = adapted()
        model.get_base_model().loss_function = lambda logits, labels, **kwargs: self.in_place(logits)
        assert_same(gradients(model), expected)


class Identity(torch.autograd.Function):
    """What DeepSpeed's engine returns outputs through: a view."""

    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def through_identity(value):
    if isinstance(value, torch.Tensor):
        return Identity.apply(value) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(map(through_identity, value))
    return value


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_hooks_on_every_output(weighting):
    """As DeepSpeed's engine registers them."""
    expected = gradients(adapted(**weighting))
    model = adapted(**weighting)
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: through_identity(output))
        module.register_forward_pre_hook(lambda m, args: through_identity(args))
    assert_same(gradients(model), expected)


class TestGradientsOfSamples:
    """As tools for differential privacy compute them."""

    @pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
    @pytest.mark.parametrize("n_nodes", [4, 40])
    def test_by_transforms(self, weighting, n_nodes):
        torch.manual_seed(0)
        net = get_peft_model(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
            LRegConfig(target_modules=["0", "2"], n_nodes=n_nodes, **weighting),
        )
        tiny.shake(net)
        net = net.double()
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])

        def loss(values, x, y):
            return nn.functional.cross_entropy(
                torch.func.functional_call(net, values, (x.unsqueeze(0),)), y.unsqueeze(0)
            )

        by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            {name: p.detach() for name, p in parameters.items()}, x, y
        )
        for i in range(5):
            expected = torch.autograd.grad(loss(dict(parameters), x[i], y[i]), list(parameters.values()))
            for name, gradient in zip(parameters, expected, strict=True):
                torch.testing.assert_close(by_sample[name][i], gradient, rtol=1e-9, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of the output layer, below which all is frozen
    def test_by_hooks_on_the_modules(self):
        """Opacus: the input and the gradient of the output of every module that owns what trains."""
        model = adapted()
        seen = {}

        def keep(name, module):
            module.register_forward_hook(lambda m, args, output: seen.setdefault(name, []).append(args[0].detach()))
            module.register_full_backward_hook(lambda m, before, after: seen[name].append(after[0].detach()))

        owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        for name in owners:
            keep(name, model.get_submodule(name))
        expected = gradients(model)
        for name in owners:
            features, gradient = seen[name]
            if name + ".bias" in expected:
                torch.testing.assert_close(expected[name + ".bias"], gradient.flatten(0, -2).sum(dim=0))
            torch.testing.assert_close(
                expected[name + ".weight"],
                torch.einsum("...o,...i->oi", gradient, features),
                rtol=1e-4,
                atol=1e-6,  # sums of 27 rows in another order
            )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # that FSDP1 is old
@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_fsdp_with_the_wrap_policy_of_peft(weighting, tmp_path):
    expected = gradients(adapted(**weighting))
    model = adapted(**weighting)
    model.get_base_model()._no_split_modules = ["GPT2Block"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=False, device_id=torch.device("cpu")
        )
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        # Flat parameters, one for each module that PEFT's policy wraps.
        found = torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None])
        own = torch.cat([gradient.flatten() for gradient in expected.values()])
        torch.testing.assert_close(found.norm(), own.norm())
        torch.testing.assert_close(found.abs().max(), own.abs().max())
        torch.testing.assert_close(loss, adapted(**weighting)(input_ids=IDS, labels=IDS).loss)
    finally:
        torch.distributed.destroy_process_group()


class TestServers:
    def two(self):
        model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", **PLACES), adapter_name="a")
        model.add_adapter("b", LRegConfig(preset="paper", **PLACES))
        for name, seed in (("a", 1), ("b", 2)):
            tiny.shake(model, name, seed)
        return model.eval()

    def test_two_threads_ask_for_different_adapters(self):
        model = self.two()
        names = {0: ["a", "b", "__base__"], 1: ["b", "b", "a"]}
        with torch.no_grad():
            expected = {key: model(input_ids=IDS, adapter_names=value).logits for key, value in names.items()}
        meet = threading.Barrier(2)
        for block in model.get_base_model().transformer.h:
            block.register_forward_pre_hook(lambda module, args: (meet.wait(30), None)[1])

        @torch.no_grad()
        def ask(key):
            return model(input_ids=IDS, adapter_names=names[key]).logits

        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(ask, (0, 1)))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    def test_a_mixed_batch_beside_one_without_names(self):
        model = self.two()
        with torch.no_grad():
            mixed, usual = model(input_ids=IDS, adapter_names=["b"] * 3).logits, model(input_ids=IDS).logits
        meet = threading.Barrier(2)
        model.get_base_model().transformer.h[1].register_forward_pre_hook(lambda module, args: (meet.wait(30), None)[1])

        @torch.no_grad()
        def ask(options):
            return model(input_ids=IDS, **options).logits

        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(ask, ({"adapter_names": ["b"] * 3}, {})))
        assert torch.equal(found[0], mixed)
        assert torch.equal(found[1], usual)


@pytest.mark.parametrize("active", [True, False])
def test_input_dtypes_are_none_of_its_business(active):
    """PEFT's helper asks every layer for the switch."""
    model = adapted().eval()
    expected = tiny.outputs(model)
    with helpers.disable_input_dtype_casting(model, active=active):
        assert torch.equal(tiny.outputs(model), expected)
    assert all(layer.cast_input_dtype_enabled for layer in tiny.layers(model))


def test_importing_replaces_nothing_of_others():
    """Functions, methods and global hooks of PEFT, Transformers and torch are the same objects before and after."""
    code = """
import sys
import peft.helpers, peft.functional, torch, transformers
import transformers.integrations.peft, transformers.core_model_loading
from peft import LoraConfig, get_peft_model
PACKAGES = ("peft", "transformers", "torch.nn", "torch.optim", "accelerate")
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if module is not None and name.startswith(PACKAGES):
            for key, value in list(vars(module).items()):
                if callable(value):
                    found[name, key] = id(value)
                if isinstance(value, type) and (value.__module__ or "").startswith(PACKAGES):
                    for attribute, member in list(vars(value).items()):
                        if callable(member) or isinstance(member, (classmethod, staticmethod, property)):
                            found[value.__module__, value.__qualname__, attribute] = id(member)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        found[name] = len(getattr(torch.nn.modules.module, name))
    return found
before = snapshot()
import lreg_peft
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), lreg_peft.LRegConfig(target_modules=["0"]))
model(torch.ones(1, 2))
after = snapshot()
# Registering a method adds its member to an enumeration.
print(sorted(key for key, value in before.items() if after.get(key) != value and "PeftType" not in key))
"""
    assert run_program(code) == "[]\n"


def test_importing_brings_only_what_an_adapter_needs():
    code = """
import sys, peft
before = set(sys.modules)
import lreg_peft
heavy = ("transformers.trainer", "datasets", "pandas", "scipy", "sklearn", "matplotlib", "torch._dynamo")
print(sorted(name for name in heavy if name in set(sys.modules) - before))
print(callable(lreg_peft.LRegCallback), callable(lreg_peft.fit_coefficients))
"""
    assert run_program(code).splitlines() == ["[]", "True True"]


def test_every_public_name_is_there():
    code = "import lreg_peft; print([name for name in lreg_peft.__all__ if getattr(lreg_peft, name, None) is None])"
    assert run_program(code) == "[]\n"


def test_lora_beside_it_is_untouched():
    """The same seed gives the same adapter and output whether or not this package is imported."""
    code = """
import torch
{}
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
config = LoraConfig(target_modules=["0"], init_lora_weights=False)
net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
print(net(torch.ones(1, 4)).tolist(), sorted(net.state_dict()))
"""
    assert run_program(code.format("")) == run_program(code.format("import lreg_peft"))
