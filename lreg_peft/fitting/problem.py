"""The convex problem of a shortcut on a model's output: its rows, its optimum, and what is reported of it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import Certificate, Chunk
from ..core.distributed import (
    AllProcesses,
    gather_objects,
    rank_and_world,
    require_equal,
    tensor_from_main,
    together,
)
from ..core.solve.problem import Report, check_options, rows_at_once
from ..modules import eval_mode
from ..rows import BatchData, LossKind, Rows, batches_of, solver_of
from ..tuner.hooks import reminder
from .feature_cache import FeatureCache
from .output_layer import OutputLayer, find_output_layer


@runtime_checkable
class RowSource(Protocol):
    """Rows that can be read again and again in the same order, such as a feature cache."""

    def chunks(self, rows_per_chunk: int) -> Iterable[Rows]:
        """All rows, at most `rows_per_chunk` at a time."""


Data = BatchData | RowSource


@dataclass(frozen=True)
class CoefficientFit(Certificate):
    """What a fit reached: a `core.Certificate` of the weights that are in the model now.

    The objective P is the model's mean loss over the labels plus `ridge / 2` times the sum of the squared weights;
    `gap` bounds how far it is from the smallest P that any weights reach. (For regression without a ridge,
    `gap + left_out` does; see `core.Certificate`.) Both are those of the weights as they are stored, rounded to the
    dtype of the adapter, and of logits and losses that are computed in fp32 or fp64. A model in bf16 or fp16 rounds its
    own logits, by up to 0.4 or 0.05 %, which moves the loss it reports to either side of P; `message` says so then.

    Attributes:
        module: name of the wrapped module.
        adapter: name of the adapter.
        n_rows: labels that the fit is about, over all processes.
        objectives: P on the mesh at the start, then after every move of the mesh that was kept; strictly falling. One
            entry without moves.
        gaps: the certificates of these. Each objective lies below the one before it by more than that one's gap, so
            that the optima of the meshes fall as well.
        n_refused: moves that were tried and undone.
    """

    module: str
    adapter: str
    n_rows: int
    objectives: tuple[float, ...]
    gaps: tuple[float, ...]
    n_refused: int = 0


def begin(model: nn.Module, adapter_name: str | None, tolerance: float, max_passes: int, **options: Any) -> OutputLayer:
    """The shortcut to fit, after all that can be checked before any work, on all processes together."""
    with together():
        output = find_output_layer(model, adapter_name)
        check_options(output.layer.table(output.adapter_name), 1.0, tolerance, max_passes)
    require_equal(
        {"adapter_name": output.adapter_name, "tolerance": tolerance, "max_passes": max_passes, **options},
        "Give every process the same options.",
    )
    require_equal(
        output.layer.state_of(output.adapter_name),
        "Set the same seed on every process before the adapter is added (torch.manual_seed), or load one file on all.",
    )
    return output


class FitProblem:
    """A shortcut on the output of a model, and the rows it is fitted to."""

    def __init__(self, output: OutputLayer, data: Data, ridge: float, show_progress: bool) -> None:
        self.output, self.ridge = output, ridge
        self.layer, self.adapter = output.layer, output.adapter_name
        self.out_features = self.layer.out_features
        self.processes = AllProcesses()
        self._rank, self._world = rank_and_world()
        self.show_progress = show_progress and self._rank == 0
        # Whichever is narrower is kept: the inputs of the output module, or its outputs.
        self._keep_offsets = self.out_features <= self.layer.in_features
        self._cache: RowSource | None = data if isinstance(data, RowSource) and not self._keep_offsets else None
        # A weight, of the base module if it has one, for device and dtype of the features.
        self._place = next(p for p in self.layer.parameters() if p.is_floating_point())
        # Latents z, targets, and offsets or features; the latter are left out if a cache has them.
        self._stored: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.loss_kind: LossKind | None = None
        with together(), torch.no_grad(), eval_mode(output.model):
            if isinstance(data, FeatureCache):
                data.check_belongs_to(output)
            parts = self._own_chunks(data) if isinstance(data, RowSource) else map(output.rows, batches_of(data))
            for rows in tqdm(parts, desc="LReg fit: features", disable=not self.show_progress):
                self._add(*rows)
        everybody = gather_objects((sum(len(targets) for _, targets, _ in self._stored), self.loss_kind))
        self.n_rows = sum(n for n, _ in everybody)
        kinds = [kind for kind in dict.fromkeys(kind for _, kind in everybody) if kind is not None]
        if len(kinds) > 1:
            raise ValueError(f"the labels must be all of one kind, but processes have {' and '.join(map(str, kinds))}.")
        if not self.n_rows:
            raise ValueError(
                "the data hold no labels to fit: they are empty (a generator can be read only once), or all labels "
                "are -100."
            )
        (self.loss_kind,) = kinds  # a process without rows does not know

    def _own_chunks(self, cache: RowSource) -> Iterator[Rows]:
        """A cache is the same for all processes: each takes its turn. Half-precision features become the model's."""
        chunks = cache.chunks(rows_at_once(self.out_features, self._place.device))
        for features, targets in islice(chunks, self._rank, None, self._world):
            yield Rows(features.to(self._place), targets.to(self._place.device))

    def _add(self, features: Tensor, targets: Tensor) -> None:
        where = f"after row {sum(len(targets) for _, targets, _ in self._stored)}"
        self.loss_kind = self.output.check(features, targets, where, self.loss_kind)
        if not self.ridge > 0 and (self.loss_kind != "squared_error" or not self.ridge == 0):
            raise ValueError(
                f"ridge must be positive, got {self.ridge}: without it there is no certificate, and for separable "
                "classes no optimum." + (" Only regression can do with 0." if self.ridge == 0 else "")
            )
        if self.ridge == math.inf:
            raise ValueError("ridge must be finite, got inf.")
        source = self.output.base_output(features) if self._keep_offsets else features
        latent = self.layer.latent(self.adapter, features)
        self._stored.append((latent, targets, None if self._cache is not None else source))

    def warn_of_missing_start(self) -> None:
        """Warn if the start from data that the configuration promises has not been made."""
        if self.adapter in self.layer.needs_data_init:
            reminder.warn("the fit", "projection and mesh are random and uniform", stacklevel=3)

    def coords_and_chunks(self) -> Iterator[tuple[Tensor, Chunk]]:
        """One pass over the rows: coordinates, and what the solver takes."""
        _, encoder, _ = self.layer.parts(self.adapter)
        for latent, targets, offset in self._passes():
            basis = encoder(latent) * self.layer.scaling[self.adapter]
            offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
            if targets.is_floating_point():
                targets = targets.to(basis.dtype)
            yield latent.sigmoid(), Chunk(basis, targets, offset)

    def _passes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Latents z, targets, offsets, a bounded number of rows at a time."""
        rows = rows_at_once(self.out_features, self._place.device)
        again = iter(()) if self._cache is None else self._own_chunks(self._cache)
        for latent, targets, source in self._stored:
            source = next(again).features if source is None else source
            for z, t, part in zip(latent.split(rows), targets.split(rows), source.split(rows), strict=True):
                yield z, t, part if self._keep_offsets else self.output.base_output(part)

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the rows, for the solvers."""
        return (chunk for _, chunk in self.coords_and_chunks())

    def fit(self, tolerance: float, max_passes: int, *, keep_bar: bool = True) -> CoefficientFit:
        """Put the weights to their optimum on the present mesh, from where they are."""
        assert self.loss_kind is not None  # there are rows
        solve = solver_of(self.loss_kind, self.out_features)
        with _progress(self.show_progress, keep_bar) as report, torch.no_grad(), eval_mode(self.output.model):
            solution = solve(
                self.chunks,
                self.layer.table(self.adapter).detach(),
                ridge=self.ridge,
                tolerance=tolerance,
                max_passes=max_passes,
                processes=self.processes,
                report=report,
            )
        table = tensor_from_main(solution.coefficients)
        with together():
            self.layer.set_table(self.adapter, table)
        certificate = {field.name: getattr(solution, field.name) for field in fields(Certificate)}
        certificate["message"] += self._remark_on_precision()
        return CoefficientFit(
            **certificate,
            module=self.output.name,
            adapter=self.adapter,
            n_rows=self.n_rows,
            objectives=(solution.objective,),
            gaps=(solution.gap,),
        )

    def _remark_on_precision(self) -> str:
        dtype = self._place.dtype
        if dtype.itemsize >= 4:
            return ""
        return (
            f" The figures are those of the stored weights in fp32 and fp64; the model computes in {dtype}, whose "
            "rounding comes on top in the loss that it reports."
        )


@contextmanager
def _progress(show: bool, keep: bool) -> Iterator[Report]:
    """A bar that counts passes and shows objective and gap."""
    with tqdm(desc="LReg fit: passes", unit="pass", disable=not show, leave=keep) as bar:

        def report(passes: int, objective: float, gap: float) -> None:
            bar.set_postfix(objective=f"{objective:.6g}", gap=f"{gap:.1e}", refresh=False)
            bar.update(passes - bar.n)

        yield report
