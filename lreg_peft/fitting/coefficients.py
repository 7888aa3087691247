"""Linear weights of a shortcut on a model's output at their global optimum, on a mesh that stays or moves.

A move of the mesh is kept only if it provably lowers the optimum.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import Chunk
from ..core.adapt.indicators import element_moments, element_sums, node_gradient
from ..core.adapt.move import AdaptedMesh, adapt_mesh
from ..core.checks import whole
from ..core.distributed import together
from ..core.mesh import locate
from ..modules import eval_mode
from ..rows import LossKind
from ..tuner.moves import Move, Tentative, agreed
from ..tuner.sites import Site
from .problem import CoefficientFit, Data, FitProblem, begin

# Moves are halved when refused, and given up when they have become this small.
_SMALLEST_SIZE = 1 / 16


def fit_coefficients(
    model: nn.Module,
    data: Data,
    *,
    ridge: float = 1e-4,
    tolerance: float = 1e-6,
    max_passes: int = 500,
    max_moves: int = 0,
    adapter_name: str | None = None,
    show_progress: bool = True,
) -> CoefficientFit:
    """Put the linear weights of a shortcut on a model's output to the global optimum of the training loss.

    With projection and mesh fixed, the shortcut is linear in the rest of its weights: the coefficients of the full
    weighting, coefficients and constant of the reduced one, the output vectors of the factored one (whose profiles stay
    as they are, and are part of what is held fixed). The model's loss is convex in them, and

        P = mean loss over all labels + ridge / 2 * (sum of the squared weights)

    has one minimum. The fit begins at the present weights, so it can follow gradient training as well as replace it.
    What everything else gives, other active adapters included, is taken as it is. The curvature penalty of the
    configuration has no part in P.

    With `max_moves` the mesh moves, too. After a fit, the sum of squared residuals in every element says where it
    is too coarse; nodes go there as `core.adapt_mesh` proposes, the weights follow by interpolation and are fitted
    again from there. The move stays if the new objective lies below the lower bound that the certificate gives for
    the old mesh, objective - gap: then the new optimum is below the old one, whatever the tolerance. Otherwise mesh
    and weights go back, and a smaller move is tried. The optimum over the weights is global for every mesh; the
    mesh itself is improved step by step.

    The data are read once: the frozen part of the model runs in eval mode, and the solver then works on the inputs of
    the output module, or on the outputs if these are narrower. Those are kept in memory, unless `data` is a feature
    cache and they are wide. Several processes end with the same weights, bit for bit.

    Args:
        model: a model with an LReg adapter on exactly the module that gives its output: a language model head, a
            classification or a regression head.
        data: batches as the model takes them, dictionaries with labels, of which every process gives its own share; or
            a feature cache (`cache_features`), of which every process takes its share.
        ridge: weight of the penalty; positive for cross-entropy, and at least 0 for regression.
        tolerance: gap at which to stop, in the units of the loss.
        max_passes: most reads of the rows in each fit; at least 3.
        max_moves: most moves of the mesh to try. 0 leaves the mesh as it is.
        adapter_name: which adapter; None takes the active one.
        show_progress: show progress with the gap, on the main process.

    Returns:
        A `CoefficientFit`; its `gap` is the certificate.

    Raises:
        ValueError: if the fit is not convex (shortcuts inside the network), if the model changes or weights its output
            in a way that rows cannot repeat; for empty or non-finite data, labels outside the classes (or outside
            [0, 1] where each output is yes or no), a cache of another model, or options out of range; and if processes
            differ in the model or the options. The model is then as it was. What one process raises, all raise.
        TypeError: if a batch is not a dictionary.

    Warns:
        RuntimeWarning: if the tolerance was not reached, with the option to change.
        UserWarning: if the start from data that the configuration promises has not been made.
    """
    with together():
        whole("max_moves", max_moves, 0)
    output = begin(model, adapter_name, tolerance, max_passes, ridge=ridge, max_moves=max_moves)
    site = Site(output.name, output.layer, output.adapter_name)
    above = [grade for grade, below in output.layer.composed_on.items() if below == output.adapter_name]
    if above and max_moves:
        raise ValueError(
            f"the grade {above[0]!r} is composed on {output.adapter_name!r} and reads its mesh: move the mesh before "
            "the grade is added."
        )
    problem = FitProblem(output, data, ridge, show_progress)
    problem.warn_of_missing_start()
    with _changed(site) as changes:
        fit = problem.fit(tolerance, max_passes)
        if max_moves:
            fit = _move_meshes(problem, site, fit, tolerance, max_passes, max_moves)
        changes.keep()
    return fit


def _move_meshes(
    problem: FitProblem,
    site: Site,
    fit: CoefficientFit,
    tolerance: float,
    max_passes: int,
    max_moves: int,
) -> CoefficientFit:
    fits = [fit]
    passes, n_refused, size = fit.passes, 0, 1.0
    moves = tqdm(range(max_moves), desc="LReg fit: mesh moves", unit="move", disable=not problem.show_progress)
    for _ in moves:
        moves.set_postfix(objective=f"{fits[-1].objective:.6g}", kept=len(fits) - 1, undone=n_refused)
        mesh = _propose(problem, site, size)
        passes += 1
        if torch.equal(mesh.nodes, mesh.old_nodes):
            break
        with _changed(site) as move:
            with together():
                Move(site, mesh, (site.parameter.detach(),)).apply()
            trial = problem.fit(tolerance, max_passes, keep_bar=False)
            passes += trial.passes
            if better := trial.objective < fits[-1].objective - fits[-1].gap:
                move.keep()
        if better:
            fits.append(trial)
            size = min(1.0, 2 * size)
            continue
        n_refused += 1
        size /= 2
        if size < _SMALLEST_SIZE:
            break
    return replace(
        fits[-1],
        passes=passes,
        objectives=tuple(fit.objective for fit in fits),
        gaps=tuple(fit.gap for fit in fits),
        n_refused=n_refused,
    )


def _changed(site: Site) -> Tentative:
    """Everything of an adapter that a move and a fit change."""
    return Tentative([site.nodes, site.parameter, *site.layer.lreg_coefficients[site.adapter].parameters()])


@torch.no_grad()
def _propose(problem: FitProblem, site: Site, size: float) -> AdaptedMesh:
    """A move, from one pass over the residuals at the optimum of the present mesh."""
    nodes = site.nodes
    components, n_nodes = nodes.shape
    scale = site.layer.scaling[site.adapter]
    coefficients = scale * site.layer.nodal_coefficients(site.adapter).detach()  # [components, n_nodes, out]
    table = site.layer.table(site.adapter).detach()
    # Slope of every element in every output, one row per element: [components * (n_nodes - 1), out].
    slopes = (coefficients.diff(dim=1) / nodes.diff(dim=1).unsqueeze(-1)).flatten(0, 1)
    first = torch.arange(components, device=nodes.device) * (n_nodes - 1)
    sums = [nodes.new_zeros(components, m, dtype=torch.float64) for m in (n_nodes - 1, 3 * (n_nodes - 1), n_nodes)]
    with together(), eval_mode(problem.output.model):
        for coords, chunk in problem.coords_and_chunks():
            residual = _residual(problem.loss_kind, chunk, _outputs(chunk, table))  # [n, out]
            element, local = locate(coords, nodes, validate=False)  # [n, components]
            energy = residual.square().sum(dim=1, keepdim=True)
            in_coords = (residual @ slopes.T.to(residual.dtype)).gather(1, element + first)
            sums[0] += element_sums(element, energy, n_nodes - 1)
            sums[1] += element_moments(element, local, n_nodes - 1).flatten(1)
            sums[2] += node_gradient(element, local, in_coords, n_nodes - 1)
    energy, moments, gradient = (problem.processes.total(tensor) for tensor in sums)
    with together():
        mesh = adapt_mesh(
            nodes,
            coefficients,
            energy,
            moments=moments.view(components, n_nodes - 1, 3),
            node_gradient=gradient,
            size=size,
        )
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
