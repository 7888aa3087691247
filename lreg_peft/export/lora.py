"""An LReg adapter as a plain LoRA, which every server and merge tool knows.

A shortcut is `B(curve(A(x)))`. On the inputs that a module really sees, each number of the design, `curve(A(x))_i`, is
replaced by its least-squares fit `a_i x`, and `B`, `a` are the two matrices of a LoRA. What is lost is what the curve
does beyond a straight line; the report says how much that is.

A LoRA cannot stand at a normalisation. The shortcut at the norm before the output layer is fitted on the output of the
norm and goes into the LoRA of the output layer: with W its weight and v the vectors at the norm, `B = W v`.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.checks import choice, number, show, whole
from ..modules import unwrap
from ..rows import BatchData, batches_of, exact_pass, loss_of, model_inputs
from ..tuner.layer import LRegLayer
from ..tuner.layout import UNSAID, first_input
from ..tuner.recommend import short_names
from .low_rank import Bias, LowRank, Shortcut, Site

_PREFIX = "base_model.model."
# The sums of one pass may take this many bytes; more modules take more passes.
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True)
class LoraReport:
    """What a conversion to LoRA has cost.

    Attributes:
        loss_before: mean loss of the LReg adapter over the batches; None for batches without labels.
        loss_after: the same of the LoRA.
        not_linear: by adapted module, the share of the variance of its shortcut's value that no linear function of its
            input, with a constant, has.
        ranks: by module of the LoRA.
    """

    loss_before: float | None
    loss_after: float | None
    not_linear: dict[str, float]
    ranks: dict[str, int]

    def __str__(self) -> str:
        width = max(map(len, (*self.not_linear, *self.ranks)))
        lines = [f"{'module':{width}}  not linear  rank"]
        for name in dict.fromkeys((*self.not_linear, *self.ranks)):
            share = f"{self.not_linear[name]:.2%}" if name in self.not_linear else "-"
            lines.append(f"{name:{width}}  {share:>10}  {self.ranks.get(name, '-'):>4}")
        if self.loss_before is not None:
            lines.append(f"loss {self.loss_before:.4f} as LReg, {self.loss_after:.4f} as LoRA")
        return "\n".join(lines)


def convert_to_lora(
    model: nn.Module,
    data: BatchData,
    *,
    adapter_name: str | Sequence[str] = "default",
    bias: Bias = "none",
    n_batches: int = 16,
    ridge: float = 1e-3,
    rank: int | float | None = None,
    uniform_rank: bool = False,
    max_rise: float = 0.02,
    show_progress: bool = True,
) -> tuple[LoraConfig, dict[str, Tensor], LoraReport]:
    """Convert an LReg adapter to a LoRA that is as close to it as a LoRA can be on given data.

    The model is not changed. The scale of the LoRA is one; its weights are in fp32.

    Args:
        model: with LReg shortcuts on linear layers or two-dimensional convolutions and, of a language model, on the
            norm before the output layer.
        data: a data set, or batches as the model takes them, such as it was trained on; the first `n_batches` are read.
            Positions with `attention_mask` 0 do not count.
        adapter_name: which adapter; of a grade the whole stack is converted, of several names their sum.
        bias: "none": a LoRA without any bias. "lora": the constants go into the bias of `lora_B` (`lora_bias=True`): a
            closer fit, which PEFT cannot merge into a layer without a bias and few servers read.
        n_batches: batches to fit on.
        ridge: of the fit, relative to the mean square of the inputs.
        rank: largest rank of a module, or the share of the squared singular values to keep, as in PEFT. None keeps one
            for each component of factored weighting, and what is not negligible of the others.
        uniform_rank: fill all modules up to the largest rank with zeros, for servers that know no `rank_pattern`.
        max_rise: relative rise of the loss above which to warn.
        show_progress: show a progress bar.

    Returns:
        config, state_dict: as of PEFT's `convert_to_lora`.
        report: losses, what is not linear, ranks.

    Raises:
        ValueError: if there is no such adapter or no batch; for shortcuts that have no LoRA, by name: around blocks,
            with a `feature_source`, a `layout` or a `readout`, at other norms; for options out of range.

    Warns:
        UserWarning: if the loss rises by more than `max_rise`, with the modules where most is lost.
    """
    choice("bias", bias, get_args(Bias))
    whole("n_batches", n_batches, 1)
    number("ridge", ridge, above=0)
    number("max_rise", max_rise, 0)
    if rank is not None and (not rank > 0 or (isinstance(rank, float) and not rank <= 1)):
        raise ValueError(f"rank must be a whole number from 1 on or a share above 0 and up to 1, got {show(rank)}.")
    inner = unwrap(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    stack = _stack(inner, names)
    sites = _sites(inner, stack)
    batches = list(islice(batches_of(data), n_batches))
    if not batches:
        raise ValueError("the data are empty: give batches such as the adapter was trained on.")
    with exact_pass(inner), _acting(inner, stack):
        before = _mean_loss(inner, batches)
        for group in _groups(sites):
            _gather(inner, group, batches, show_progress)
        parts = {site.name: site.fit(bias, ridge, rank) for site in sites}
        with _as_lora(inner, sites, parts):
            after = _mean_loss(inner, batches)
    if uniform_rank:
        most = max(len(part.a) for part in parts.values())
        for part in parts.values():
            part.fill_up(most)
    ranks = {name: len(part.a) for name, part in parts.items()}
    shares = {name: share for site in sites for name, share in site.not_linear.items()}
    if before is not None and after is not None and not after <= before + max_rise * abs(before):
        worst = sorted(shares, key=lambda name: -shares[name])[:3]
        warnings.warn(
            f"as a LoRA the adapter has a loss of {after:.4f} where it has {before:.4f} as LReg. Least linear are "
            + ", ".join(f"{name!r} ({shares[name]:.1%})" for name in worst)
            + ". bias='lora' keeps the constants, and more batches (n_batches) make the fit surer.",
            UserWarning,
            stacklevel=3,
        )
    config = _config(inner, stack, [site.base for site in sites], ranks, bias)
    return config, _state_dict(inner, stack, parts), LoraReport(before, after, shares, ranks)


def save_as_lora(path: str | os.PathLike, model: nn.Module, data: BatchData, **options: Any) -> LoraReport:
    """Convert an LReg adapter to a LoRA and write it to a folder that `PeftModel.from_pretrained` loads without LReg.

    Args:
        path: the folder; it is made.
        model: as in `convert_to_lora`.
        data: as in `convert_to_lora`.
        options: further arguments of `convert_to_lora`.

    Returns:
        The report.

    Raises:
        ValueError: as `convert_to_lora`; nothing is written then.
    """
    folder = Path(path)
    config, state_dict, report = convert_to_lora(model, data, **options)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return report


# What is converted


def _stack(model: nn.Module, names: list[str]) -> list[str]:
    """The adapters with the grades that they stand on, in order."""
    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    there = sorted({adapter for layer in layers for adapter in layer.lreg_encoder})
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"adapter_name: the model has no LReg adapter {missing[0]!r}. There are: {there}.")
    if not names:
        raise ValueError(f"adapter_name must name an adapter, got an empty list. There are: {there}.")
    previous = layers[0].previous_grades
    return list(dict.fromkeys(name for last in names for name in (*previous.get(last, ()), last)))


def _sites(model: nn.Module, stack: list[str]) -> list[Site]:
    """Where LoRAs go; raises a ValueError that names the shortcuts that have none."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    head = output.get_base_layer() if isinstance(output, LRegLayer) else output
    sites, norms, refused = [], [], []
    for name, layer in model.named_modules():
        own = [adapter for adapter in stack if isinstance(layer, LRegLayer) and adapter in layer.lreg_encoder]
        if not own or not isinstance(layer, LRegLayer):
            continue
        reason, base = _why_not(layer, own), layer.get_base_layer()
        if reason is None:
            sites.append(Site(name, layer, Shortcut(name, layer, own)))
        elif "norm" in type(base).__name__.lower() and layer.source is None and type(head) is nn.Linear:
            norms.append(Shortcut(name, layer, own))
        else:
            refused.append((name, reason))
    for earlier in norms[:-1]:
        refused.append((earlier.name, "it is not the norm before the output layer"))
    if refused:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in refused[:4])
        raise ValueError(
            f"{len(refused)} of the shortcuts have no LoRA ({listed}). Train shortcuts on linear layers instead, as "
            "recommended_config does."
        )
    if norms:
        site = next((site for site in sites if site.module is output), None)
        if site is None:
            name = next(name for name, module in model.named_modules() if module is output)
            sites.append(site := Site(name, output))  # type: ignore[arg-type]
        site.norm = norms[-1]
    return sites


def _why_not(layer: LRegLayer, adapters: list[str]) -> str | None:
    """Why a shortcut cannot be a LoRA; None if it can."""
    base = layer.get_base_layer()
    if layer.source is not None:
        return "it reads the output of another module"
    if any(layer.readings.get(name, UNSAID) != UNSAID for name in adapters):
        return "it has a layout or readout of its own"
    if isinstance(base, nn.Conv2d):
        plain = base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)
        return None if plain and set(base.dilation) == {1} else "PEFT's LoRA knows no such groups, padding or dilation"
    return None if isinstance(base, (nn.Linear, Conv1D)) else f"a LoRA cannot stand at a {type(base).__name__}"


# Passes over the data


@contextmanager
def _acting(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Have the adapters that are converted act, whichever are active, with what was trained in full beside them."""
    wanted: dict[Any, list[str]] = {}
    for module in model.modules():
        if isinstance(module, LRegLayer):
            wanted[module] = stack
        elif isinstance(module, AuxiliaryTrainingWrapper) and (owner := _owner(module, stack)):
            wanted |= {each: [owner] for each in (module, module._modules.get("token_adapter")) if each is not None}
    with _with_state({module: (list(names), False) for module, names in wanted.items()}):
        yield


@contextmanager
def _with_state(wanted: dict[Any, tuple[Any, bool]]) -> Iterator[None]:
    """Active adapters, and whether they are disabled, for the time of a block."""
    before = {module: (module._active_adapter, module._disable_adapters) for module in wanted}
    try:
        for module, state in wanted.items():
            module._active_adapter, module._disable_adapters = state
        yield
    finally:
        for module, state in before.items():
            module._active_adapter, module._disable_adapters = state


def _owner(module: AuxiliaryTrainingWrapper, stack: list[str]) -> str | None:
    """Whose copy of a module that was trained in full belongs to a stack."""
    return next((name for name in reversed(stack) if name in module._adapters), None)


def _groups(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose sums fit into memory together."""
    group: list[Site] = []
    for site in sites:
        if group and sum(8 * (each.width + 1) ** 2 for each in [*group, site]) > _MOST_BYTES:
            yield group
            group = []
        group.append(site)
    yield group


def _gather(model: nn.Module, sites: list[Site], batches: list[Mapping[str, Any]], show_progress: bool) -> None:
    """One pass over the batches, for the sums of some sites."""
    mask: list[Any] = [None]
    handles = [remove for site in sites for remove in _watch(site, mask)]
    try:
        for batch in tqdm(batches, desc="LReg to LoRA", disable=not show_progress):
            inputs = model_inputs(model, batch, labels=False)
            mask[0] = inputs.get("attention_mask")
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def _watch(site: Site, mask: list[Any]) -> list[Any]:
    """Hooks that count the rows of a site."""
    norm, own = site.norm, site.own
    from_norm: list[Tensor] = []  # its output without the shortcut, the design, its output

    def see_norm(module: LRegLayer, args: Any, kwargs: Any, output: Tensor) -> None:
        plain = module.base_layer(*args, **kwargs)
        from_norm[:] = plain, norm.design(module.seen_features(args, kwargs), output), output  # type: ignore[union-attr]

    def see(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        features = _input(module, args, kwargs)
        designs = [own.design(features, output)] if own else []
        if norm is not None:
            if not from_norm or not torch.equal(from_norm[2], features):
                raise ValueError(
                    f"the output layer {site.name!r} does not read the output of {norm.name!r}, so that the shortcut "
                    "there cannot go into its LoRA. Leave it out: recommended_config(..., final_norm=False)."
                )
            features, designs = from_norm[0], [from_norm[1], *designs]
        rows, design = site.rows(features), torch.cat(designs, dim=1)
        if isinstance(mask[0], Tensor) and mask[0].numel() == len(rows):
            counts = mask[0].flatten().bool()
            rows, design = rows[counts], design[counts]
        site.add(rows, design)

    handles: list[Any] = [site.module.register_forward_hook(see, with_kwargs=True)]
    if norm is not None:
        handles.append(norm.layer.register_forward_hook(see_norm, with_kwargs=True))  # type: ignore[arg-type]
    return handles


def _input(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    return first_input(args, kwargs, next(iter(kwargs), None), lambda: module)


@contextmanager
def _as_lora(model: nn.Module, sites: list[Site], parts: dict[str, LowRank]) -> Iterator[None]:
    """Have the LoRA act in place of the shortcuts."""
    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    handles = []
    for site in sites:
        hook = partial(_add_lora, site, parts[site.name])
        handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
    try:
        with _with_state({layer: (layer._active_adapter, True) for layer in layers}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _add_lora(site: Site, part: LowRank, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    rows = site.rows(_input(module, args, kwargs))
    value = rows @ part.a.T.to(rows) @ part.b.T.to(rows)
    if part.bias is not None:
        value = value + part.bias.to(value)
    if site.kernel:
        batch, channels, *space = output.shape
        return output + value.view(batch, *space, channels).movedim(-1, 1).to(output.dtype)
    return output + value.view_as(output).to(output.dtype)


def _mean_loss(model: nn.Module, batches: list[Mapping[str, Any]]) -> float | None:
    losses = [loss_of(model(**model_inputs(model, batch, labels=False))) for batch in batches]
    if any(not isinstance(loss, Tensor) for loss in losses):
        return None
    return float(torch.stack([loss.double().mean() for loss in losses]).mean())


# PEFT's format


def _config(model: Any, stack: list[str], bases: list[nn.Module], ranks: dict[str, int], bias: Bias) -> LoraConfig:
    configs = [model.peft_config[name] for name in stack]
    counts = list(ranks.values())
    most = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=short_names(model, list(ranks)),
        task_type=configs[-1].task_type,
        base_model_name_or_path=configs[-1].base_model_name_or_path,
        revision=configs[-1].revision,
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save or []}) or None,
        trainable_token_indices=configs[-1].trainable_token_indices or None,
        lora_bias=bias == "lora",
        fan_in_fan_out=all(isinstance(base, Conv1D) for base in bases),
        inference_mode=True,
    )


def _state_dict(model: nn.Module, stack: list[str], parts: dict[str, LowRank]) -> dict[str, Tensor]:
    state = {}
    for name, part in parts.items():
        state.update({f"{_PREFIX}{name}.{key}": value for key, value in part.tensors().items()})
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and (owner := _owner(module, stack)):
            saved = module.adapter_state_dict(owner, dict(module.state_dict()))
            state.update({f"{_PREFIX}{name}.{key}": value.detach().cpu().clone() for key, value in saved.items()})
    return state
