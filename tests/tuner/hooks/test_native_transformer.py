"""torch's own transformer layers read weights past their modules; shortcuts there run all the same."""

import pytest
import torch
from peft import get_peft_model
from tiny import shake
from torch import Tensor, nn

from lreg_peft import LRegConfig, inspect_targets

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def adapted(*targets: str, **options) -> nn.Module:
    model = get_peft_model(Encoder().eval(), LRegConfig(target_modules=list(targets), **options))
    shake(model)
    return model


@pytest.mark.parametrize("targets", [("linear1",), ("linear2",), ("self_attn",), ("self_attn", "linear1", "linear2")])
@pytest.mark.parametrize("mask", [None, PADDING])
def test_shortcuts_run_and_train(targets, mask):
    model = adapted(*targets)
    plain = Encoder().eval()
    plain.encoder.use_nested_tensor = False  # a prototype of torch's, which warns
    kept = slice(None) if mask is None else ~mask
    with torch.no_grad():
        expected = model.get_base_model().train()(X, mask)[kept]  # in train mode every module is called; no dropout
        model.eval()
        found = model(X, mask)[kept]
        assert not torch.allclose(found, plain(X, mask)[kept], atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mode in (True, False):
        model.train(mode)
        model.zero_grad()
        model(X, mask)[kept].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.any(), name


def test_unloading_gives_the_fast_path_back():
    base = Encoder().eval()
    layer = base.encoder.layers[0]
    before = base.encoder.use_nested_tensor
    model = get_peft_model(base, LRegConfig(target_modules=["linear1"]))
    assert not base.encoder.use_nested_tensor
    model.unload()
    assert base.encoder.use_nested_tensor == before
    assert not layer._forward_pre_hooks


def test_an_output_projection_that_is_never_called():
    base = Encoder()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"reads its weight and never calls it.*Target 'encoder.layers.0.self_attn'"):
        get_peft_model(base, LRegConfig(target_modules=["out_proj"]))
    assert [name for name, _ in base.named_modules()] == before
    with pytest.warns(UserWarning, match="'all-linear' leaves out 'encoder.layers.0.self_attn.out_proj'"):
        report = inspect_targets(base, LRegConfig(target_modules="all-linear"))
    assert {target.name.rpartition(".")[2] for target in report} == {"linear1", "linear2"}
    with pytest.warns(UserWarning, match="'all-linear' leaves out"):
        model = get_peft_model(base, LRegConfig(target_modules="all-linear"))
    shake(model)
    model.train()(X).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
