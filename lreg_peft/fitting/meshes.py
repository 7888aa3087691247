"""Certified fits on meshes that move: every move kept provably lowers the optimum of the training loss."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import Chunk
from ..core.adapt.indicators import element_moments, element_sums, node_gradient
from ..core.adapt.move import AdaptedMesh, Strategy, adapt_mesh
from ..core.checks import anything, checked, number, real, whole
from ..core.distributed import together
from ..core.mesh import locate
from ..modules import eval_mode
from ..plotting import new_figure
from ..rows import LossKind
from ..tuner.moves import Move, Tentative, agreed
from ..tuner.sites import Site
from .coefficients import CoefficientFit, Data, FitProblem, Fitted, begin
from .knot_program import KnotProgram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FitStrategy = Literal["exchange", "mrc", "program"]

# Moves are halved when refused, and given up when they have become this small.
_SMALLEST_SIZE = 1 / 16


@dataclass(frozen=True)
class MeshFit:
    """A history of certified fits.

    Attributes:
        fit: of the mesh and the weights that are in the model now.
        objectives: P on the mesh at the start, then after every kept move; strictly falling.
        gaps: the certificates of these. Each objective lies below the one before it by more than that one's gap, so
            that the optima of the meshes fall as well.
        n_refused: moves that were tried and undone.
        passes: reads of all rows, by the solver and for the proposals.
    """

    fit: CoefficientFit
    objectives: tuple[float, ...]
    gaps: tuple[float, ...]
    n_refused: int
    passes: int

    def plot(self) -> "Figure":
        """Draw the objective over the kept moves, down to what the gap leaves possible.

        Returns:
            A matplotlib figure; save it with `figure.savefig("history.png")`.

        Raises:
            ImportError: without matplotlib.
        """
        figure = new_figure("MeshFit.plot", 5.0, 3.2)
        axes = figure.subplots()
        moves = range(len(self.objectives))
        lowest = [objective - gap for objective, gap in zip(self.objectives, self.gaps, strict=True)]
        axes.fill_between(moves, lowest, self.objectives, color="#0b5394", alpha=0.3, label="where the optimum is")
        axes.plot(moves, self.objectives, "o-", color="#0b5394", markersize=3, label="objective reached")
        axes.set_xlabel("kept mesh moves")
        axes.set_ylabel("objective")
        axes.set_title(f"{self.fit.module}: {len(moves) - 1} moves kept, {self.n_refused} undone", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        return figure


@checked(
    stage=together,
    ridge=real,
    tolerance=number(above=0),
    max_moves=whole(0),
    strategy=anything,
    n_refine=whole(0),
    max_passes=whole(3),
)
def fit_meshes(
    model: nn.Module,
    data: Data,
    *,
    ridge: float = 1e-4,
    tolerance: float = 1e-6,
    max_moves: int = 20,
    strategy: FitStrategy = "exchange",
    n_refine: int | None = None,
    max_passes: int = 500,
    adapter_name: str | None = None,
    show_progress: bool = True,
) -> MeshFit:
    """Alternate `fit_coefficients` and moves of the mesh; keep a move only if it provably lowers the optimum.

    After a fit, the residuals say where the mesh is too coarse; the nodes are moved there, the weights follow by
    interpolation and are fitted again from there. The move stays if the new objective lies below the lower bound that
    the certificate gives for the old mesh, objective - gap: then the new optimum is below the old one, whatever the
    tolerance. Otherwise mesh and weights go back, and a smaller move is tried. The optimum over the weights is global
    for every mesh; the mesh itself is improved step by step.

    Args:
        model: as in `fit_coefficients`.
        data: as in `fit_coefficients`; read once.
        ridge: as in `fit_coefficients`.
        tolerance: as in `fit_coefficients`.
        max_moves: most moves to try.
        strategy: "exchange" or "mrc", see `core.adapt.adapt_mesh`; both look at the sum of squared residuals in every
            element, where the paper counts hits. "program" is "exchange" after a first move to the best nodes that a
            dynamic program finds for each component on a grid (up to 48 nodes): a lower objective, and with many nodes
            and noisy labels one that says less about other data.
        n_refine: elements to split per component and move, see `adapt_mesh`.
        max_passes: most reads of the rows in each fit.
        adapter_name: as in `fit_coefficients`.
        show_progress: as in `fit_coefficients`.

    Returns:
        A `MeshFit`, whose objectives fall.

    Raises:
        ValueError: as in `fit_coefficients`, or for options out of range. The model is then as it was.
        TypeError: as in `fit_coefficients`.
        RuntimeError: as in `fit_coefficients`.
    """
    with together():
        if strategy not in get_args(FitStrategy):
            raise ValueError(f"strategy must be one of {get_args(FitStrategy)}, got {strategy!r}.")
    options = {"ridge": ridge, "max_moves": max_moves, "strategy": strategy, "n_refine": n_refine}
    output = begin(model, adapter_name, tolerance, max_passes, **options)
    above = [grade for grade, below in output.layer.composed_on.items() if below == output.adapter_name]
    if above:
        raise ValueError(
            f"the grade {above[0]!r} is composed on {output.adapter_name!r} and reads its mesh: move the mesh before "
            "the grade is added."
        )
    problem = FitProblem(output, data, ridge, show_progress)
    problem.warn_of_missing_start()
    site = Site(output.name, output.layer, output.adapter_name)
    with _changed(site) as whole:
        result = _alternate(problem, site, tolerance, max_passes, max_moves, strategy, n_refine)
        whole.keep()
    return result


def _alternate(
    problem: FitProblem,
    site: Site,
    tolerance: float,
    max_passes: int,
    max_moves: int,
    strategy: FitStrategy,
    n_refine: int | None,
) -> MeshFit:
    fits = [_fitted(problem, tolerance, max_passes)]
    passes, n_refused, size = fits[0].passes, 0, 1.0
    moves = tqdm(range(max_moves), desc="LReg fit: mesh moves", unit="move", disable=not problem.show_progress)
    program = strategy == "program" and KnotProgram.is_for(site.nodes)
    later: Strategy = "mrc" if strategy == "mrc" else "exchange"
    for _ in moves:
        moves.set_postfix(objective=f"{fits[-1].objective:.6g}", kept=len(fits) - 1, undone=n_refused)
        first, program = program, False
        mesh = _from_program(problem, site) if first else _propose(problem, site, later, n_refine, size)
        passes += 1
        if torch.equal(mesh.nodes, mesh.old_nodes):
            if first:
                continue
            break
        with _changed(site) as move:
            with together():
                Move(site, mesh, (site.parameter.detach(),)).apply()
            trial = _fitted(problem, tolerance, max_passes)
            passes += trial.passes
            if better := trial.objective < fits[-1].objective - fits[-1].gap:
                move.keep()
        if better:
            fits.append(trial)
            size = min(1.0, 2 * size)
            continue
        n_refused += 1
        if first:  # the exchanges that follow have not been tried in any size
            continue
        size /= 2
        if strategy == "mrc" or size < _SMALLEST_SIZE:  # the published update knows no smaller move
            break
    return MeshFit(fits[-1], tuple(fit.objective for fit in fits), tuple(fit.gap for fit in fits), n_refused, passes)


def _fitted(problem: FitProblem, tolerance: float, max_passes: int) -> CoefficientFit:
    """Solve on the present mesh and write the weights."""
    fitted: Fitted = problem.solve(tolerance, max_passes, keep_bar=False)
    problem.write(fitted.table)
    return fitted.summary


def _changed(site: Site) -> Tentative:
    """Everything of an adapter that a move and a fit change."""
    return Tentative([site.nodes, site.parameter, *site.layer.lreg_coefficients[site.adapter].parameters()])


@torch.no_grad()
def _propose(problem: FitProblem, site: Site, strategy: Strategy, n_refine: int | None, size: float) -> AdaptedMesh:
    """A move, from one pass over the residuals at the optimum of the present mesh."""
    nodes = site.nodes
    components, dof = nodes.shape
    scale = site.layer.scaling[site.adapter]
    coefficients = scale * site.layer.nodal_coefficients(site.adapter).detach()  # [components, dof, out]
    table = site.layer.table(site.adapter).detach()
    # Slope of every element in every output, one row per element: [components * (dof - 1), out].
    slopes = (coefficients.diff(dim=1) / nodes.diff(dim=1).unsqueeze(-1)).flatten(0, 1)
    first = torch.arange(components, device=nodes.device) * (dof - 1)
    sums = [nodes.new_zeros(components, m, dtype=torch.float64) for m in (dof - 1, 3 * (dof - 1), dof)]
    with together(), eval_mode(problem.output.model):
        for coords, chunk in problem.coords_and_chunks():
            residual = _residual(problem.loss_kind, chunk, _outputs(chunk, table))  # [n, out]
            element, local = locate(coords, nodes, validate=False)  # [n, components]
            energy = residual.square().sum(dim=1, keepdim=True)
            in_coords = (residual @ slopes.T.to(residual.dtype)).gather(1, element + first)
            sums[0] += element_sums(element, energy, dof - 1)
            sums[1] += element_moments(element, local, dof - 1).flatten(1)
            sums[2] += node_gradient(element, local, in_coords, dof - 1)
    energy, moments, gradient = (problem.processes.total(tensor) for tensor in sums)
    exchange = strategy == "exchange"
    with together():
        mesh = adapt_mesh(
            nodes,
            coefficients,
            energy,
            strategy=strategy,
            n_refine=n_refine,
            moments=moments.view(components, dof - 1, 3) if exchange else None,
            node_gradient=gradient if exchange else None,
            size=size,
        )
    return agreed(mesh)


@torch.no_grad()
def _from_program(problem: FitProblem, site: Site) -> AdaptedMesh:
    """The first proposal, from one pass: the best nodes from a grid for each component."""
    table = site.layer.table(site.adapter).detach()
    program = KnotProgram(site.nodes, site.layer.nodal_coefficients(site.adapter).detach(), problem.loss_kind)
    with together(), eval_mode(problem.output.model):
        for coords, chunk in problem.coords_and_chunks():
            outputs = _outputs(chunk, table)
            program.add(coords, _residual(problem.loss_kind, chunk, outputs), outputs)
    for tensor in program.sums:
        tensor.copy_(problem.processes.total(tensor))
    with together():
        mesh = program.mesh()
    return agreed(mesh)


def _outputs(chunk: Chunk, table: Tensor) -> Tensor:
    """`[n, out]`."""
    assert chunk.offset is not None
    basis = chunk.basis.to(chunk.offset.dtype)
    return torch.addmm(chunk.offset, basis, table.to(basis.dtype))


def _residual(loss_kind: LossKind | None, chunk: Chunk, outputs: Tensor) -> Tensor:
    """Gradient of every sample's loss in its outputs, up to a factor: `[n, out]`."""
    if loss_kind == "squared_error":
        return outputs - chunk.target
    if loss_kind == "binary_cross_entropy":
        return outputs.sigmoid() - chunk.target
    own = chunk.target.unsqueeze(1)
    return torch.softmax(outputs, dim=1).scatter_add_(1, own, -torch.ones_like(own, dtype=outputs.dtype))
