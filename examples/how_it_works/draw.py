"""Draw the figure of the README: one component of a shortcut, its basis and its coefficients.

python examples/how_it_works/draw.py [--output how_it_works.png]
"""

import argparse
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """Where the picture goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("how_it_works.png"))
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from lreg_peft.core import evaluate, hat_basis, quantile_nodes

N_NODES = 7


def draw(output: Path) -> None:
    """Three panels: the inputs and their quantile mesh, the hat basis on it, the function it carries."""
    torch.manual_seed(0)
    projected = torch.cat((torch.randn(1400, 1) * 0.7 - 1.5, torch.randn(600, 1) * 0.5 + 1.6))
    coords = torch.sigmoid(projected)
    nodes = quantile_nodes(coords, N_NODES)
    u = torch.linspace(0, 1, 801).unsqueeze(1)
    basis = hat_basis(u, nodes)[:, 0]
    coefficients = torch.tensor([0.1, 0.5, 0.2, -0.4, -0.1, 0.6, 0.3]).view(1, N_NODES, 1)

    figure, panels = plt.subplots(1, 3, figsize=(11, 2.9), sharex=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, N_NODES))
    panels[0].hist(coords.squeeze(1).numpy(), bins=50, color="#b8c4d6")
    panels[0].set_title("1. coordinates  u = sigmoid(P x + b)", fontsize=10)
    panels[0].set_yticks([])
    for j in range(N_NODES):
        panels[1].plot(u, basis[:, j], color=colours[j], linewidth=1.8)
    panels[1].set_title("2. hat basis  $\\psi_j(u)$ on an adaptive mesh", fontsize=10)
    panels[2].plot(u, evaluate(u, nodes, coefficients), color="#1f4e8c", linewidth=2)
    panels[2].scatter(nodes[0], coefficients[0, :, 0], color=colours, zorder=3, s=42)
    panels[2].set_title("3. shortcut  $\\Sigma_j\\, \\psi_j(u)\\, c_j$  (dots: $c_j$)", fontsize=10)
    for panel in panels:
        for node in nodes[0].tolist():
            panel.axvline(node, color="#c23b22", linewidth=0.8, linestyle=":")
        panel.set_xlabel("u  (dotted: nodes)")
        panel.set_xlim(-0.02, 1.02)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    draw(ARGUMENTS.output)
