"""Meshes that follow the residual: what a sample says of its element, two rules that move nodes, and one transfer.

`move.adapt_mesh` is the door; the rest may be used one by one, all of it pure and batched over components.
Decisions are taken in fp64 from elementwise arithmetic, fixed-order scans and stable sorts, with ties broken by index,
so that processes holding identical inputs get bit-identical nodes.
"""

from .indicators import element_moments, element_sums, mark, node_gradient, removal_cost
from .move import AdaptedMesh, Strategy, adapt_mesh
from .mrc import coarsen, refine
from .relocate import MAX_SHIFT, independent_nodes, remove
from .transfer import interpolate

__all__ = [
    "MAX_SHIFT",
    "AdaptedMesh",
    "Strategy",
    "adapt_mesh",
    "coarsen",
    "element_moments",
    "element_sums",
    "independent_nodes",
    "interpolate",
    "mark",
    "node_gradient",
    "refine",
    "removal_cost",
    "remove",
]
