"""Where a mesh of simplices should start: the Freudenthal grid of the estimator, or Delaunay's mesh of samples.

Both are refined by the same bisections from as many nodes, in the same scaled coordinates. Delaunay's nodes are samples
drawn at random and the corners of the cube, so that the mesh covers it; on a grid, whose points lie on common spheres,
Delaunay's mesh has simplices without volume in three dimensions and cannot be used. Test R^2, nodes, the worst shape
of the final mesh (volume times d! over the longest edge to the power of d) and CPU seconds. From the repository root:

    python -m benchmarks.measurements.simplicial_start
"""

import argparse
import itertools
import time
from unittest import mock

import numpy as np
import torch
from scipy.spatial import Delaunay
from sklearn.metrics import r2_score

from benchmarks.regression.benchmark_sets import synthetic
from lreg_peft.regression import simplicial
from lreg_peft.regression.scaling import fit_scale
from lreg_peft.regression.simplices import SimplicialMesh, grid_mesh, shape_quality, simplicial_mesh

SETS = {"A2": "quantile", "S2": "quantile", "C.4": "minmax", "3-D": "quantile"}


def delaunay(points: np.ndarray, n_nodes: int, seed: int) -> SimplicialMesh:
    """Delaunay's mesh of the corners of the unit cube and samples, `n_nodes` in all; `points` are scaled samples."""
    d = points.shape[1]
    corners = np.array(list(itertools.product((0.0, 1.0), repeat=d)))
    inner = points[((points > 0.01) & (points < 0.99)).all(axis=1)]
    chosen = np.random.default_rng(seed).choice(len(inner), n_nodes - len(corners), replace=False)
    found = Delaunay(np.concatenate((corners, inner[chosen])))
    return simplicial_mesh(torch.from_numpy(found.points), torch.from_numpy(found.simplices))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the samples drawn as nodes")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help=f"of {', '.join(SETS)}")
    options = parser.parse_args()
    print(
        "| set | start | seed | nodes at the start | at the end | test R^2 | worst shape | CPU seconds |\n"
        + "|---" * 8
        + "|"
    )
    for name in options.sets:
        split, scale = synthetic(name).split(0), SETS[name]
        scaled = fit_scale(split.x, None, scale).transform(split.x)
        d = split.x.shape[1]
        usual = grid_mesh(d, simplicial._START_CELLS[d])
        n_nodes = max(len(usual.nodes), 2**d + 4)
        starts = [("grid", 0, usual)] + [("Delaunay", seed, delaunay(scaled, n_nodes, seed)) for seed in options.seeds]
        for start, seed, mesh in starts:
            with mock.patch.object(simplicial, "_starting_mesh", lambda *_, mesh=mesh: mesh):
                began = time.process_time()
                fit = simplicial.fit_simplicial(split.x, split.y, scale=scale)
                seconds = time.process_time() - began
            worst = shape_quality(fit.mesh.nodes, fit.mesh.simplices).min().item()
            score = r2_score(split.y_test, fit.predict(split.x_test))
            cells = [name, start, seed, len(mesh.nodes), len(fit.mesh.nodes)]
            cells += [f"{score:.5f}", f"{worst:.2g}", f"{seconds:.1f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
