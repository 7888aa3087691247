"""An LReg adapter as a plain LoRA, which every server and merge tool knows.

A shortcut is `B(curve(A(x)))`. On the inputs that a module really sees, each number of the design, `curve(A(x))_i`, is
replaced by its least-squares fit `a_i x`, and `B`, `a` are the two matrices of a LoRA. What is lost is what the curve does
beyond a straight line; the report says how much that is.

A LoRA cannot stand at a normalisation. The shortcut at the norm before the output layer is fitted on the output of the
norm and goes into the LoRA of the output layer: with W its weight and v the vectors at the norm, `B = W v`.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modules import eval_mode, unwrap
from ..rows import loss_of, model_inputs
from ..tuner.layer import LRegLayer
from ..tuner.layout import UNSAID
from ..tuner.recommend import short_names

_PREFIX = "base_model.model."
# Sums of squares that are gathered at the same time may take this many bytes; more modules take more passes.
_MOST_BYTES = 2 * 2**30
# Share of the squared singular values that heads with many functions keep if no rank is given.
_ENERGY = 1 - 1e-6

Bias = Literal["none", "lora"]


@dataclass(frozen=True)
class LoraReport:
    """What a conversion to LoRA has cost.

    Attributes:
        loss_before: mean loss of the LReg adapter on the batches; None for batches without labels.
        loss_after: the same of the LoRA.
        not_linear: by module, the share of the variance of its shortcut's value that no linear function of its input has.
        ranks: by module of the LoRA.
    """

    loss_before: float | None
    loss_after: float | None
    not_linear: dict[str, float]
    ranks: dict[str, int]

    def __str__(self) -> str:
        width = max(map(len, self.not_linear))
        lines = [f"{'module':{width}}  not linear  rank"]
        for name, share in self.not_linear.items():
            lines.append(f"{name:{width}}  {share:10.2%}  {self.ranks.get(name, '-'):>4}")
        if self.loss_before is not None:
            lines.append(f"loss {self.loss_before:.4f} as LReg, {self.loss_after:.4f} as LoRA")
        return "\n".join(lines)


def convert_to_lora(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
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

    The model is not changed. The scale of the LoRA is one; its weights are in the dtype of the adapter.

    Args:
        model: with LReg shortcuts on linear layers or two-dimensional convolutions and, of a language model, on the norm
            before the output layer.
        dataloader: batches as the model takes them, such as it was trained on; the first `n_batches` are read.
        adapter_name: which adapter; of a grade the whole stack is converted, of several names their sum.
        bias: "none": a LoRA without any bias. "lora": the constants go into the bias of `lora_B` (`lora_bias=True`): a
            closer fit, which PEFT cannot merge into a layer without a bias and few servers read.
        n_batches: batches to fit on.
        ridge: of the fit, relative to the mean square of the inputs.
        rank: largest rank of a module, or the share of the squared singular values to keep, as in PEFT. None keeps one
            for each component of a factored head, and what is not negligible of the others.
        uniform_rank: fill all modules up to the largest rank with zeros, for servers that know no `rank_pattern`.
        max_rise: relative rise of the loss above which to warn.
        show_progress: show a progress bar.

    Returns:
        config, state_dict: as of PEFT's `convert_to_lora`.
        report: losses and what is not linear.

    Raises:
        ValueError: if there is no such adapter or no batch; for shortcuts that have no LoRA, by name: around blocks, with
            a `feature_source`, a `layout` or a `readout`, at other norms; for options out of range.

    Warns:
        UserWarning: if the loss rises by more than `max_rise`, with the modules where most is lost.
    """
    _check_options(bias, n_batches, ridge, rank)
    inner = unwrap(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    plan = _Plan.of(inner, names)
    batches = list(islice(dataloader, n_batches))
    if not batches:
        raise ValueError("the dataloader is empty: give batches such as the adapter was trained on.")
    with torch.no_grad(), eval_mode(inner), plan.active(inner):
        before = _mean_loss(inner, batches)
        for group in plan.groups():
            _gather(inner, group, batches, show_progress)
        parts = {site.name: site.fit(bias, ridge, rank) for site in plan.sites}
        with _as_lora(inner, plan, parts):
            after = _mean_loss(inner, batches)
    if uniform_rank:
        _fill_up(parts)
    ranks = {name: len(part.a) for name, part in parts.items()}
    shares = {name: share for site in plan.sites for name, share in site.not_linear.items()}
    report = LoraReport(before, after, shares, ranks)
    if before is not None and after is not None and after > before + max_rise * abs(before):
        worst = sorted(shares, key=lambda name: -shares[name])[:3]
        warnings.warn(
            f"as a LoRA the adapter has a loss of {after:.4f} where it has {before:.4f} as LReg. Least linear are "
            + ", ".join(f"{name!r} ({shares[name]:.1%})" for name in worst)
            + ". bias='lora' keeps the constants, and more batches (n_batches) make the fit surer.",
            UserWarning,
            stacklevel=2,
        )
    return _config(inner, names, plan, ranks, bias), _state_dict(inner, names, parts, bias), report


def save_as_lora(
    path: str | os.PathLike, model: nn.Module, dataloader: Iterable[Mapping[str, Any]], **options: Any
) -> LoraReport:
    """Convert an LReg adapter to a LoRA and write it to a folder that `PeftModel.from_pretrained` loads without LReg.

    Args:
        path: the folder; it is made.
        model: as in `convert_to_lora`.
        dataloader: as in `convert_to_lora`.
        options: further arguments of `convert_to_lora`.

    Returns:
        The report.

    Raises:
        ValueError: as `convert_to_lora`; nothing is written then.
    """
    config, state_dict, report = convert_to_lora(model, dataloader, **options)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return report


def _check_options(bias: str, n_batches: int, ridge: float, rank: int | float | None) -> None:
    if bias not in ("none", "lora"):
        raise ValueError(f"bias must be 'none' or 'lora', got {bias!r}.")
    if n_batches < 1:
        raise ValueError(f"n_batches must be at least 1, got {n_batches}.")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be positive and finite, got {ridge}.")
    if rank is not None and (isinstance(rank, bool) or rank <= 0 or (isinstance(rank, float) and rank > 1)):
        raise ValueError(f"rank must be a whole number from 1 on, or a share in (0, 1], got {rank!r}.")


@dataclass
class _LowRank:
    """The two matrices of a LoRA, `a` `[r, in]` (of a convolution `[r, in, *kernel]`) and `b` `[out, r]`, and a bias."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


@dataclass
class _Site:
    """A module that gets a LoRA, with the sums of squares that its fit needs.

    Attributes:
        name: of the module in the model.
        module: an `LRegLayer`, or an output layer without a shortcut of its own.
        adapters: names of its adapters, in order.
        norm: name and layer of the norm before an output layer whose shortcut goes in here.
        norm_adapters: of that.
    """

    name: str
    module: nn.Module
    adapters: list[str]
    norm: tuple[str, LRegLayer] | None = None
    norm_adapters: list[str] = field(default_factory=list)
    not_linear: dict[str, float] = field(default_factory=dict)
    gram: Tensor | None = None  # [m + 1, m + 1], inputs and a one
    cross: Tensor | None = None  # [m + 1, K]
    squares: Tensor | None = None  # [K]

    @property
    def base(self) -> nn.Module:
        """The module itself."""
        return self.module.get_base_layer() if isinstance(self.module, LRegLayer) else self.module

    @property
    def width(self) -> int:
        """Numbers that a row of the LoRA reads."""
        base: Any = self.base
        if isinstance(base, nn.Conv2d):
            return base.in_channels * base.kernel_size[0] * base.kernel_size[1]
        return base.nx if isinstance(base, Conv1D) else base.in_features  # type: ignore[no-any-return]

    def rows(self, features: Tensor) -> Tensor:
        """What the LoRA multiplies, `[..., width]`, in the positions of the output."""
        if isinstance(base := self.base, nn.Conv2d):
            patches = F.unfold(features, base.kernel_size, base.dilation, base.padding, base.stride)  # type: ignore[arg-type]
            return patches.movedim(1, -1)
        return features

    def design(self, features: Tensor, output: Tensor) -> Tensor:
        """The design of all adapters here, scaled, `[..., K]`, in the positions of the output."""
        if not isinstance(layer := self.module, LRegLayer):
            return features.new_zeros(*features.shape[:-1], 0)
        parts = []
        for name in self.adapters:
            layout = layer.layout(name, features, output)
            design = layout.pool(layer.design(name, layout.rows(features))) * layer.scaling[name]
            parts.append(design.flatten(1, -2) if isinstance(self.base, nn.Conv2d) else design)
        return torch.cat(parts, dim=-1)

    def table(self) -> Tensor:
        """What the design is multiplied by, `[K, out]`, the part of the norm first."""
        own = [self.module.table(name) for name in self.adapters] if isinstance(self.module, LRegLayer) else []
        if self.norm is not None:
            weight: Any = self.base.weight  # [out, hidden]
            own = [self.norm[1].table(name).to(weight) @ weight.T for name in self.norm_adapters] + own
        return torch.cat([table.double().cpu() for table in own])

    def linear_part(self) -> Tensor:
        """The linear term of the design in the inputs, `[K, width]`: what a fit corrects rather than finds."""
        known = []
        for names, layer in ((self.norm_adapters, None), (self.adapters, self.module)):
            for name in names:
                if layer is None or not isinstance(layer, LRegLayer):
                    norm: Any = self.norm
                    known.append(torch.zeros(norm[1].parts(name)[1].n_functions, self.width, dtype=torch.float64))
                    continue
                projection, encoder, _ = layer.parts(name)
                is_plain = encoder.slope and name not in layer.composed_on and not isinstance(self.base, nn.Conv2d)
                if is_plain:
                    known.append(projection.weight.double().cpu() * encoder.slope * layer.scaling[name])
                else:
                    known.append(torch.zeros(encoder.n_functions, self.width, dtype=torch.float64))
        return torch.cat(known)

    def add(self, rows: Tensor, design: Tensor) -> None:
        """Count rows `[n, width]` and their design `[n, K]`."""
        x = F.pad(rows.double(), (0, 1), value=1.0)
        d = design.double()
        sums = (x.T @ x).cpu(), (x.T @ d).cpu(), d.square().sum(dim=0).cpu()
        if self.gram is None or self.cross is None or self.squares is None:
            self.gram, self.cross, self.squares = sums
        else:
            self.gram += sums[0]
            self.cross += sums[1]
            self.squares += sums[2]

    def fit(self, bias: Bias, ridge: float, rank: int | float | None) -> _LowRank:
        """The LoRA, from the sums, which are forgotten."""
        if self.gram is None or self.cross is None or self.squares is None:
            raise ValueError(f"no row of the batches reached {self.name!r}: give batches that run the whole model.")
        gram, cross, squares = self.gram, self.cross, self.squares
        self.gram = self.cross = self.squares = None
        n, table = gram[-1, -1], self.table()
        prior = self.linear_part()  # [K, m]
        rest = cross - gram[:, :-1] @ prior.T  # of what the linear term leaves
        system = gram if bias == "lora" else gram[:-1, :-1]
        damping = ridge * gram.diagonal()[:-1].mean() * torch.ones(len(system), dtype=torch.float64)
        if bias == "lora":
            damping[-1] = 0.0
        found = torch.linalg.solve(system + damping.diag(), rest[: len(system)])
        a = prior + found[: self.width].T  # [K, m]
        self._judge(gram, cross, squares, n, table)
        constant = found[-1] @ table if bias == "lora" else None  # [out]
        a, b = _reduce(a, table.T, self._rank(rank))
        if isinstance(base := self.base, nn.Conv2d):
            a = a.view(len(a), base.in_channels, *base.kernel_size)
        return _LowRank(a, b, constant)

    def _rank(self, rank: int | float | None) -> int | float | None:
        layer = self.norm[1] if not isinstance(self.module, LRegLayer) and self.norm else self.module
        heads = [layer.parts(name)[1].head for name in self.adapters or self.norm_adapters]  # type: ignore[union-attr,operator]
        return _ENERGY if rank is None and set(heads) != {"factored"} else rank

    def _judge(self, gram: Tensor, cross: Tensor, squares: Tensor, n: Tensor, table: Tensor) -> None:
        """Share of the variance of the value that the best affine functions of the inputs leave, of each shortcut."""
        tiny = 1e-10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        best = torch.linalg.solve(gram + tiny, cross)
        left = (squares - (cross * best).sum(dim=0)).clamp_min(0)
        total = (squares - cross[-1].square() / n).clamp_min(0)
        weight = table.square().sum(dim=1)
        sizes = []
        if self.norm is not None:
            own = sum(self.norm[1].parts(name)[1].n_functions for name in self.norm_adapters)
            sizes.append((self.norm[0], slice(0, own)))
        else:
            own = 0
        if self.adapters:
            sizes.append((self.name, slice(own, None)))
        for name, part in sizes:
            all_of_it = float((weight * total)[part].sum())
            self.not_linear[name] = float((weight * left)[part].sum()) / all_of_it if all_of_it else 0.0


def _reduce(a: Tensor, b: Tensor, rank: int | float | None) -> tuple[Tensor, Tensor]:
    """`b a` with a given rank or share of energy at most: `[r, m]` and `[out, r]`."""
    if rank is None or (isinstance(rank, int) and rank >= len(a)):
        return a, b
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    if isinstance(rank, float):
        energy = s.square().cumsum(dim=0)
        rank = int((energy < rank * energy[-1]).sum()) + 1 if energy[-1] > 0 else 1
    return v[:rank] @ q_a.T, (q_b @ u[:, :rank]) * s[:rank]


@dataclass
class _Plan:
    """Which modules get a LoRA."""

    sites: list[_Site]
    adapters: list[str]

    @classmethod
    def of(cls, model: nn.Module, adapters: list[str]) -> "_Plan":
        """Raises a ValueError that names every shortcut without a LoRA."""
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LRegLayer)]
        there = {adapter for _, layer in layers for adapter in layer.lreg_encoder}
        if missing := [name for name in adapters if name not in there]:
            raise ValueError(f"the model has no LReg adapter {missing[0]!r}. There are: {sorted(there)}.")
        stack = list(dict.fromkeys(n for last in adapters for n in (*layers[0][1].previous_grades.get(last, ()), last)))
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        base = output.get_base_layer() if isinstance(output, LRegLayer) else output
        sites, norms, refused = [], [], []
        for name, layer in layers:
            own = [adapter for adapter in stack if adapter in layer.lreg_encoder]
            if not own:
                continue
            if reason := _why_not(layer, own):
                is_norm = "norm" in type(layer.get_base_layer()).__name__.lower() and type(base) is nn.Linear
                (norms if is_norm else refused).append((name, layer, own) if is_norm else (name, reason))
            else:
                sites.append(_Site(name, layer, own))
        if norms:
            name, layer, own = norms.pop()  # type: ignore[misc]
            site = next((site for site in sites if site.module is output), None)
            if site is None:
                path = next(path for path, module in model.named_modules() if module is output)
                sites.append(site := _Site(path, output, []))
            site.norm, site.norm_adapters = (name, layer), own  # type: ignore[assignment]
        refused += [(name, "it is not the norm before the output layer") for name, *_ in norms]
        if refused:
            listed = "; ".join(f"{name!r}: {reason}" for name, reason in refused[:4])
            raise ValueError(
                f"{len(refused)} of the shortcuts have no LoRA ({listed}). Train shortcuts on linear layers instead, as "
                "recommended_config does."
            )
        return cls(sites, stack)

    def groups(self) -> Iterator[list[_Site]]:
        """Sites whose sums fit into memory together."""
        group: list[_Site] = []
        for site in self.sites:
            if group and sum(8 * (other.width + 1) ** 2 for other in [*group, site]) > _MOST_BYTES:
                yield group
                group = []
            group.append(site)
        yield group

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Have the adapters that are converted act, whichever are active."""
        layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
        try:
            for layer in layers:
                layer._active_adapter, layer._disable_adapters = list(self.adapters), False
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled


def _why_not(layer: LRegLayer, adapters: list[str]) -> str | None:
    """Why a shortcut cannot be a LoRA; None if it can."""
    base = layer.get_base_layer()
    if layer.source is not None:
        return "it reads the output of another module"
    if any(layer.readings.get(name, UNSAID) != UNSAID for name in adapters):
        return "it has a layout or readout of its own"
    if isinstance(base, nn.Conv2d):
        return None if base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str) else "it is a grouped convolution"
    if isinstance(base, (nn.Linear, Conv1D)):
        return None
    return f"a LoRA cannot stand at a {type(base).__name__}"


def _gather(model: nn.Module, sites: list[_Site], batches: list[Mapping[str, Any]], show_progress: bool) -> None:
    """One pass over the batches, for the sums of some sites."""
    mask: list[Tensor | None] = [None]
    removers = [remove for site in sites for remove in _watch(site, mask)]
    try:
        for batch in tqdm(batches, desc="LReg to LoRA", disable=not show_progress):
            mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _run(model, batch)
    finally:
        for remove in removers:
            remove()


def _watch(site: _Site, mask: list[Tensor | None]) -> list[Any]:
    """Hooks that count the rows of a site; returns what removes them."""
    from_norm: list[tuple[Tensor, Tensor, Tensor]] = []  # output without shortcut, design, output

    def see_norm(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        features = module.seen_features(args, kwargs)
        designs = [module.design(name, features) * module.scaling[name] for name in site.norm_adapters]
        from_norm[:] = [(module.base_layer(*args, **kwargs), torch.cat(designs, dim=-1), output)]

    def see(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        features = args[0] if args else next(iter(kwargs.values()))
        design, read = site.design(features, output), features
        if site.norm is not None:
            if not from_norm or from_norm[0][2].shape != features.shape or not from_norm[0][2].equal(features):
                raise ValueError(
                    f"the output layer {site.name!r} does not read the output of {site.norm[0]!r}, so that its shortcut "
                    "cannot go into a LoRA there. Leave that norm out: recommended_config(..., final_norm=False)."
                )
            read = from_norm[0][0]
            design = torch.cat((from_norm[0][1].to(design), design), dim=-1)
        rows = site.rows(read)
        counts = mask[0]
        if counts is not None and counts.ndim == 2 and counts.shape == rows.shape[:-1]:
            kept = counts.to(rows.device).bool()
            site.add(rows[kept], design[kept])
        else:
            site.add(rows.reshape(-1, rows.shape[-1]), design.reshape(-1, design.shape[-1]))

    removers = [site.module.register_forward_hook(see, with_kwargs=True).remove]
    if site.norm is not None:
        removers.append(site.norm[1].register_forward_hook(see_norm, with_kwargs=True).remove)
    return removers


@contextmanager
def _as_lora(model: nn.Module, plan: _Plan, parts: dict[str, _LowRank]) -> Iterator[None]:
    """Have the LoRA act in place of the shortcuts."""

    def act(site: _Site, part: _LowRank, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        rows = site.rows(args[0] if args else next(iter(kwargs.values())))
        value = rows @ part.a.flatten(1).T.to(rows) @ part.b.T.to(rows)
        if part.bias is not None:
            value = value + part.bias.to(value)
        if isinstance(site.base, nn.Conv2d):
            value = value.movedim(-1, 1).reshape(output.shape)
        return output + value.to(output.dtype)

    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    handles = []
    try:
        for layer in layers:
            layer._disable_adapters = True
        for site in plan.sites:
            hook = _bind(act, site, parts[site.name])
            handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer._disable_adapters = False


def _bind(act: Any, site: _Site, part: _LowRank) -> Any:
    return lambda module, args, kwargs, output: act(site, part, module, args, kwargs, output)


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**model_inputs(model, batch, labels=False))


def _mean_loss(model: nn.Module, batches: list[Mapping[str, Any]]) -> float | None:
    losses = [loss_of(_run(model, batch)) for batch in batches]
    if any(not isinstance(loss, Tensor) for loss in losses):
        return None
    return float(torch.stack([loss.float().mean() for loss in losses]).mean())


def _fill_up(parts: dict[str, _LowRank]) -> None:
    """Zeros up to the largest rank."""
    most = max(len(part.a) for part in parts.values())
    for part in parts.values():
        extra = most - len(part.a)
        part.a = torch.cat((part.a, part.a.new_zeros(extra, *part.a.shape[1:])))
        part.b = F.pad(part.b, (0, extra))


def _config(model: nn.Module, adapters: list[str], plan: _Plan, ranks: dict[str, int], bias: Bias) -> LoraConfig:
    own: Any = model.peft_config[adapters[0]]  # type: ignore[index,union-attr]
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name: rank for name, rank in ranks.items() if rank != most}
    kinds = {isinstance(site.base, Conv1D) for site in plan.sites}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=short_names(model, list(ranks)),
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        revision=own.revision,
        modules_to_save=own.modules_to_save,
        lora_bias=bias == "lora",
        fan_in_fan_out=kinds == {True},
        inference_mode=True,
    )


def _state_dict(model: nn.Module, adapters: list[str], parts: dict[str, _LowRank], bias: Bias) -> dict[str, Tensor]:
    state = {}
    for name, part in parts.items():
        a, b = part.a.float(), part.b.float()
        state[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = (b[:, :, None, None] if a.ndim == 4 else b).contiguous()
        if part.bias is not None:
            state[f"{_PREFIX}{name}.lora_B.bias"] = part.bias.float().contiguous()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = next((adapter for adapter in adapters if adapter in module._adapters), None)
            if own is not None:
                saved = module.adapter_state_dict(own, dict(module.state_dict()))
                state.update({f"{_PREFIX}{name}.{key}": value.detach().cpu().clone() for key, value in saved.items()})
    return state
