"""Pictures of meshes: where the nodes are, what the coefficients do there, and where the samples fall."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .core.checks import whole
from .modules import eval_mode
from .rows import BatchData, batches_of, model_inputs
from .tuner.sites import Site, all_sites

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 60
# Two hues that stay apart for colour-blind readers and in grey.
_NOW, _BEFORE = "#0b5394", "#e08214"


def plot_meshes(
    model: nn.Module,
    modules: Sequence[str] | str | None = None,
    before: nn.Module | None = None,
    *,
    data: BatchData | None = None,
    max_components: int = 3,
    adapter_name: str | None = None,
) -> "Figure":
    """Draw meshes: one row per module, one column per component.

    Each panel shows the nodes now (and before, if given) as ticks, the norm over all outputs of the slope in each
    element, which is what the nodes resolve, as steps, and as shaded areas how the samples' coordinates are
    distributed. The models run in eval mode.

    Args:
        model: any module that contains LReg layers.
        modules: paths of modules in the model, or ends of paths, or one of them; None takes the first four.
        before: another copy of the model to compare with: one that `copy.deepcopy` made before training, or that an
            earlier checkpoint was loaded into.
        data: a data set, or batches as the model takes them; None draws no distribution.
        max_components: columns at most.
        adapter_name: which adapter; None takes the first active one of every layer.

    Returns:
        A matplotlib figure; save it with `figure.savefig("meshes.png")`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no such adapter, or no LReg layer matches `modules`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_meshes draws with matplotlib. Install it: pip install matplotlib.") from error
    whole("max_components", max_components, 1)
    now = _meshes(model, data, adapter_name)
    drawn = [(now, _NOW, "now", 0.06)]
    if before is not None:
        drawn.insert(0, (_meshes(before, data, adapter_name), _BEFORE, "before", 0.0))
    paths = _choose(list(now), modules)
    columns = min(max_components, max(len(now[path].nodes) for path in paths))
    figure = Figure(figsize=(4.2 * columns, 2.7 * len(paths) + 0.6), layout="constrained")
    axes = figure.subplots(len(paths), columns, squeeze=False)
    for row, path in zip(axes, paths, strict=True):
        for component, panel in enumerate(row):
            if component >= len(now[path].nodes):
                panel.set_axis_off()
                continue
            panel.set_title(f"{path}, component {component}", fontsize=8)
            behind = panel.twinx()  # the distributions, with an axis of their own that nobody needs to read
            behind.set_yticks([])
            panel.set_zorder(behind.get_zorder() + 1)
            panel.patch.set_visible(False)
            for meshes, colour, label, lift in drawn:
                if path in meshes:
                    _draw(panel, behind, meshes[path], component, colour, label, lift)
            panel.set_xlim(0, 1)
            panel.set_xlabel("coordinate u", fontsize=8)
            panel.tick_params(labelsize=7)
        row[0].set_ylabel("norm of slope", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class _Mesh:
    """Of one module, on the CPU: nodes `[components, n_nodes]`, the values there `[components, n_nodes, out_features]`,
    and coordinates of samples `[n, components]`, None without data."""

    nodes: Tensor
    values: Tensor
    coords: Tensor | None


@torch.no_grad()
def _meshes(model: nn.Module, data: BatchData | None, adapter_name: str | None) -> dict[str, _Mesh]:
    """The mesh of every module, by its path; of several adapters that of the first."""
    sites: dict[str, Site] = {}
    for site in all_sites(model, adapter_name):
        sites.setdefault(site.module, site)
    seen: dict[str, list[Tensor]] = {path: [] for path in sites}

    def note(path: str, features: Tensor) -> None:
        coords = sites[path].layer.coords(sites[path].adapter, features)
        seen[path].append(coords.flatten(0, -2).float().cpu())

    with ExitStack() as hooks, eval_mode(model):
        for path, site in sites.items():
            hooks.callback(site.layer.register_input_hook(partial(note, path), site.adapter))
        for batch in () if data is None else batches_of(data):
            model(**model_inputs(model, batch, labels=False))
    return {
        path: _Mesh(
            site.nodes.detach().cpu(),
            site.layer.nodal_coefficients(site.adapter).detach().float().cpu(),
            torch.cat(seen[path]) if seen[path] else None,
        )
        for path, site in sites.items()
    }


def _choose(paths: list[str], modules: Sequence[str] | str | None) -> list[str]:
    if modules is None:
        return paths[:4]
    modules = [modules] if isinstance(modules, str) else modules
    chosen = [path for path in paths if any(path == name or path.endswith(f".{name}") for name in modules)]
    if not chosen:
        raise ValueError(f"no LReg layer matches modules={list(modules)}. The layers are: {paths}.")
    return chosen


def _draw(panel: "Axes", behind: "Axes", mesh: _Mesh, component: int, colour: str, label: str, lift: float) -> None:
    """One component of a mesh; `lift` is where its ticks begin, in fractions of the panel's height."""
    nodes, values = mesh.nodes[component], mesh.values[component]  # [n_nodes], [n_nodes, out_features]
    slope = torch.linalg.vector_norm(values.diff(dim=0), dim=-1) / nodes.diff()
    panel.stairs(slope, nodes, color=colour, label=f"slope {label}", baseline=None)
    edge = panel.get_xaxis_transform()
    panel.vlines(nodes, lift, lift + 0.05, transform=edge, color=colour, linewidth=2.5, label=f"nodes {label}")
    if mesh.coords is not None:
        samples = mesh.coords[:, component].numpy()
        behind.hist(samples, bins=_BINS, range=(0, 1), density=True, color=colour, alpha=0.18)
        panel.fill([], [], color=colour, alpha=0.18, label=f"samples {label}")
