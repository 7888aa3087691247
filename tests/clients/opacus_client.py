"""Opacus: the gradient of every sample, as differentially private training needs it.

pip install --no-deps opacus opt_einsum
"""

from functools import partial

import torch
from common import causal_lm, run, shake, texts, tokenizer
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from peft import get_peft_model

from lreg_peft import LRegConfig
from lreg_peft.core.encoder import LagrangeEncoder

WEIGHTINGS = {
    "full": {"n_nodes": 4},
    "reduced": {"weighting": "reduced", "n_nodes": 4},
    "factored": {"weighting": "factored", "linear_term": True},
}


@register_grad_sampler(LagrangeEncoder)
def profiles(encoder: LagrangeEncoder, activations: list[torch.Tensor], gradients: torch.Tensor) -> dict:
    """Of the profiles: Opacus works out modules itself unless they have buffers, here the nodes."""
    hats = encoder.basis(activations[0]).unflatten(-1, encoder.nodes.shape)  # [samples, ..., d, n]
    return {encoder.weight: torch.einsum("n...i,n...ij->nij", gradients, hats)}


def every_sample(weighting: str) -> str:
    """Beside the gradients of the samples one by one."""
    ids = tokenizer()(texts(4), return_tensors="pt").input_ids
    model = get_peft_model(
        causal_lm(), LRegConfig(target_modules=["q_proj", "mlp", "lm_head"], **WEIGHTINGS[weighting])
    )
    shake(model)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    alone = []
    for sample in ids.split(1):
        loss = model(input_ids=sample, labels=sample).loss
        alone.append(torch.autograd.grad(loss, list(trained.values())))
    # Not strict: a module with buffers and parameters is refused, and nodes hold nothing of a sample.
    wrapped = GradSampleModule(model, strict=False)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    worst = 0.0
    for (name, parameter), wanted in zip(trained.items(), zip(*alone, strict=True), strict=True):
        difference = (parameter.grad_sample - torch.stack(wanted)).abs().max() / torch.stack(wanted).abs().max()
        assert difference < 1e-4, f"{name} differs by {difference:.1e}"  # fp32, sums in another order
        worst = max(worst, difference.item())
    return f"equal to {worst:.0e}"


if __name__ == "__main__":
    run({f"gradients of samples, {weighting} weighting": partial(every_sample, weighting) for weighting in WEIGHTINGS})
