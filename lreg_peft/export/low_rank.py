"""The least-squares fit of shortcuts by the two matrices of a LoRA, from sums over the rows that a module sees."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tuner.layer import LRegLayer

# Share of the squared singular values that weightings with more functions than components keep if no rank is given.
_ENERGY = 1 - 1e-6

Bias = Literal["none", "lora"]


@dataclass
class LowRank:
    """The two matrices of a LoRA, `a` `[r, width]` and `b` `[out, r]`, and a bias `[out]`."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    kernel: tuple[int, ...] = ()  # of a convolution: its channels and size, whose product is the width

    def fill_up(self, rank: int) -> None:
        """Zeros up to a rank."""
        self.a = F.pad(self.a, (0, 0, 0, rank - len(self.a)))
        self.b = F.pad(self.b, (0, rank - self.b.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """By the names of PEFT."""
        a = self.a.reshape(-1, *self.kernel) if self.kernel else self.a
        found = {"lora_A.weight": a, "lora_B.weight": self.b[:, :, None, None] if self.kernel else self.b}
        if self.bias is not None:
            found["lora_B.bias"] = self.bias
        return {name: value.float().contiguous() for name, value in found.items()}


@dataclass(eq=False)
class Shortcut:
    """What is converted of one layer: the value is `design @ table`."""

    name: str
    layer: LRegLayer
    adapters: list[str]

    def design(self, features: Tensor, output: Tensor) -> Tensor:
        """`[n, K]`, scaled, one row for each position of the output."""
        parts = []
        for name in self.adapters:
            layout = self.layer.layout(name, features, output)
            design = layout.pool(self.layer.scaled_design(name, layout.rows(features)))
            parts.append(design.flatten(0, -2))
        return torch.cat(parts, dim=-1)

    def table(self) -> Tensor:
        """`[K, out_features]`."""
        return torch.cat([self.layer.table(name) for name in self.adapters])

    def slopes(self, width: int) -> Tensor:
        """What the design has of each input already, `[K, width]`: its linear term, where it reads just these."""
        known = []
        for name in self.adapters:
            projection, encoder, _ = self.layer.parts(name)
            slope = torch.zeros(encoder.n_functions, width, dtype=torch.float64)
            if encoder.slope and projection.weight.shape[1] == width:
                slope += projection.matrix.double().cpu() * encoder.slope * self.layer.scaling[name]
            known.append(slope)
        return torch.cat(known)


@dataclass(eq=False)
class Site:
    """A module that gets a LoRA.

    Attributes:
        name: of the module in the model.
        module: an `LRegLayer`, or an output layer without a shortcut.
        own: the shortcut there.
        norm: that of the norm before an output layer.
    """

    name: str
    module: nn.Module
    own: Shortcut | None = None
    norm: Shortcut | None = None

    def __post_init__(self) -> None:
        self.base: Any = self.module.get_base_layer() if isinstance(self.module, LRegLayer) else self.module
        self.kernel = (self.base.in_channels, *self.base.kernel_size) if isinstance(self.base, nn.Conv2d) else ()
        self.width = math.prod(self.kernel) if self.kernel else _in_features(self.base)
        self.sums: Tensor | None = None  # of products of all pairs of: inputs, a one, the design
        self.not_linear: dict[str, float] = {}

    def rows(self, features: Tensor) -> Tensor:
        """What the LoRA multiplies, `[n, width]`, one row for each position of the output."""
        if self.kernel:
            base = self.base
            patches = F.unfold(features, base.kernel_size, base.dilation, base.padding, base.stride)
            return patches.movedim(1, -1).flatten(0, -2)
        return features.reshape(-1, self.width)

    def add(self, rows: Tensor, design: Tensor) -> None:
        """Count some rows."""
        joint = torch.cat((F.pad(rows.double(), (0, 1), value=1.0), design.double()), dim=1)
        sums = (joint.T @ joint).cpu()
        self.sums = sums if self.sums is None else self.sums + sums

    def fit(self, bias: Bias, ridge: float, rank: int | float | None) -> LowRank:
        """The LoRA, from the sums, which are forgotten."""
        m = self.width
        if self.sums is None or not (scale := self.sums.diagonal()[:m].mean()):
            raise ValueError(f"no input reached {self.name!r}: give batches that run the whole model.")
        gram, cross, moments = self.sums[: m + 1, : m + 1], self.sums[: m + 1, m + 1 :], self.sums[m + 1 :, m + 1 :]
        self.sums = None
        tables, slopes, weightings = [], [], set()
        for shortcut in filter(None, (self.norm, self.own)):
            table = shortcut.table()
            if shortcut is self.norm:
                table = table.float() @ self.base.weight.T.float()
            tables.append(table.double().cpu())
            is_own = shortcut is self.own and not self.kernel
            slopes.append(shortcut.slopes(m) if is_own else torch.zeros(len(table), m, dtype=torch.float64))
            weightings |= {shortcut.layer.parts(name)[1].weighting for name in shortcut.adapters}
        self._judge(gram, cross, moments, tables)
        table, slope = torch.cat(tables), torch.cat(slopes)
        size = m + (bias == "lora")
        damping = (ridge * scale).repeat(size)
        damping[m:] = 0
        left = cross - gram[:, :m] @ slope.T  # a linear term stays as it is, and the fit is of the rest
        found = torch.linalg.solve(gram[:size, :size] + damping.diag(), left[:size])
        constant = found[-1] @ table if bias == "lora" else None
        if rank is None and weightings != {"factored"}:
            rank = _ENERGY
        a, b = _reduce(slope + found[:m].T, table.T, rank)
        return LowRank(a, b, constant, self.kernel)

    def _judge(self, gram: Tensor, cross: Tensor, moments: Tensor, tables: list[Tensor]) -> None:
        """Which share of the variance of each shortcut's value the best linear functions with a constant leave."""
        tiny = 1e-10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        left = moments - cross.T @ torch.linalg.solve(gram + tiny, cross)
        total = moments - torch.outer(cross[-1], cross[-1]) / gram[-1, -1]
        start = 0
        for shortcut, table in zip(filter(None, (self.norm, self.own)), tables, strict=True):
            part = slice(start, start := start + len(table))
            rest, whole_of_it = (float((table * (c[part, part] @ table)).sum().clamp_min(0)) for c in (left, total))
            self.not_linear[shortcut.name] = rest / whole_of_it if whole_of_it else 0.0


def _in_features(base: Any) -> int:
    return base.nx if isinstance(base, Conv1D) else base.in_features  # type: ignore[no-any-return]


def _reduce(a: Tensor, b: Tensor, rank: int | float | None) -> tuple[Tensor, Tensor]:
    """`b a` with a given rank, or share of the squared singular values, at most: `[r, m]` and `[out, r]`."""
    if rank is None or (isinstance(rank, int) and rank >= len(a)):
        return a, b
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if isinstance(rank, float):
        energy = s.square().cumsum(dim=0)
        rank = min(int((energy < rank * energy[-1]).sum()) + 1, len(s))
    return v[:rank] @ q_a.T, (q_b @ u[:, :rank]) * s[:rank]
