"""Draw the pictures of the site into docs/assets: all, or those that are named.

    python docs/tools/pictures.py [budgets shortcut mesh learning-rates language-model ...]

`budgets` is drawn from the record of the study, `mesh` and `learning-rates` are computed (a minute on a CPU core), and
those with the name of a tutorial are drawn by the code of that page.
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from notebooks import cells
from PIL import Image

DOCS = Path(__file__).parents[1]
ASSETS = DOCS / "assets"
OURS, OTHERS, FROZEN = "#c23b22", "#4a5568", "#b8c4d6"
NAMES = {
    "lreg": "LReg",
    "unilora": "Uni-LoRA",
    "rslora": "rsLoRA",
    "lora-gradient": "LoRA, gradient start",
    "lora-linear-head": "LoRA",
}


def budgets() -> plt.Figure:
    """Test perplexity over trained parameters, from the study's record."""
    record = json.loads((DOCS.parent / "benchmarks" / "peft_methods" / "results" / "wikitext-axes.json").read_text())
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for colour, (method, name) in zip((OURS, "#1f4e8c", "#6b9080", "#b08968", OTHERS), NAMES.items(), strict=True):
        rows = sorted((row for row in record["rows"] if row["method"] == method), key=lambda row: row["trainable"])
        figures = [[test["perplexity"] for test in row["test"]] for row in rows]
        axes.errorbar(
            [row["trainable"] for row in rows],
            [statistics.mean(some) for some in figures],
            yerr=[statistics.stdev(some) for some in figures],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=2.4 if method == "lreg" else 1,
            color=colour,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([4096, 8192, 16384, 32768, 65536], ["4,096", "8,192", "16,384", "32,768", "65,536"])
    axes.set(xlabel="trained parameters", ylabel="test perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("GPT-2 of 5.3 M adapted to WikiText in 50 steps, three seeds", fontsize=9)
    return figure


def shortcut() -> plt.Figure:
    """A frozen module and its shortcut as boxes."""
    figure, axes = plt.subplots(figsize=(7, 2.3), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(0, 4))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        axes.add_patch(plt.Rectangle((x, y), width, 1.1, facecolor=colour, edgecolor="black", linewidth=0.8))
        axes.text(x + width / 2, y + 0.55, text, ha="center", va="center", fontsize=9)

    def arrow(*points: tuple[float, float]) -> None:
        axes.plot(*zip(*points[:-1], strict=True), color="black", linewidth=1)
        axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "linewidth": 1})

    box(3.6, 2.6, 2.6, "f: frozen module", FROZEN)
    box(1.6, 0.3, 2.0, "A: lreg_projection\nnn.Linear, P and b", "#f3d2c9")
    box(4.1, 0.3, 1.9, "lreg_encoder\ncurve on nodes", "#f3d2c9")
    box(6.5, 0.3, 2.0, "B: lreg_coefficients\nnn.Linear, no bias", "#f3d2c9")
    axes.text(0.3, 3.15, "x", fontsize=12, ha="center", va="center")
    axes.text(9.75, 3.15, "y", fontsize=12, ha="center", va="center")
    axes.text(9.1, 3.15, "+", fontsize=14, ha="center", va="center", bbox={"boxstyle": "circle", "facecolor": "white"})
    arrow((0.5, 3.15), (3.6, 3.15))
    arrow((6.2, 3.15), (8.85, 3.15))
    arrow((9.3, 3.15), (9.6, 3.15))
    arrow((1.0, 3.15), (1.0, 0.85), (1.6, 0.85))
    arrow((3.6, 0.85), (4.1, 0.85))
    arrow((6.0, 0.85), (6.5, 0.85))
    arrow((8.5, 0.85), (9.1, 0.85), (9.1, 2.8))
    for x, text in ((3.85, "z"), (6.25, "K"), (1.25, "in"), (8.8, "out")):
        axes.text(x, 1.0, text, fontsize=8, ha="center", color=OTHERS)
    return figure


def mesh() -> plt.Figure:
    """The same number of nodes in three places."""
    from lreg_peft.regression import LagrangeRegressor

    random = np.random.default_rng(0)
    x = np.sort(1 / random.uniform(1, 50, size=1000))[:, None]
    t = np.sin(1 / x[:, 0]) + 0.05 * random.normal(size=1000)
    options = {"n_nodes": 24, "smoothing": 1e-8}
    fits = {
        "evenly spaced": LagrangeRegressor(scale="minmax", **options),
        "at quantiles": LagrangeRegressor(**options),
        "moved by the fit": LagrangeRegressor(nodes="free", n_nodes=24),
    }
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.5), sharey=True, layout="constrained")
    grid = np.geomspace(x.min(), 1, 2000)
    for panel, (name, fit) in zip(panels, fits.items(), strict=True):
        fit.fit(x, t)
        (term,) = fit.terms_
        panel.scatter(x, t, s=2, color=FROZEN)
        panel.plot(grid, fit.predict(grid[:, None]), color=OURS, linewidth=1.2)
        nodes = np.asarray(term.nodes[0]).ravel()
        panel.plot(nodes, np.full(len(nodes), -1.4), "|", color="black", markersize=9)
        panel.set_xscale("log")
        panel.set(title=name, xlabel="x (bars: nodes)", ylim=(-1.6, 1.4))
        panel.title.set_fontsize(9)
    return figure


def run_page(page: Path, names: dict | None = None) -> dict:
    """What the blocks of a page leave behind; they run in the folder we are in."""
    names = {} if names is None else names
    for kind, text in cells(page.read_text(encoding="utf-8")):
        if kind == "code":
            exec(compile(text, str(page), "exec"), names)
    return names


def loss_at(method: str, rate: float, names: dict) -> float:
    """Mean training loss of steps 51 to 60 of the language model tutorial's model; `names` are those of its page."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader

    import lreg_peft

    torch.manual_seed(0)
    model = names["GPT2LMHeadModel"].from_pretrained("base")
    if method == "LReg":
        config = lreg_peft.recommended_config(model, "lora:4:all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        loader = DataLoader(names["train"], batch_size=16, shuffle=True)
        lreg_peft.initialize_lreg_weights(model, loader, show_progress=False)
    else:
        options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "fan_in_fan_out": True}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    trainer = names["Trainer"](model, names["arguments"](60, rate), train_dataset=names["train"])
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses[-2:]) / 2


def learning_rates() -> plt.Figure:
    """Training loss after 60 steps over the rate, on the model of the language model tutorial."""
    names: dict = {}
    page = (DOCS / "tutorials" / "language-model.md").read_text(encoding="utf-8")
    exec(next(text for kind, text in cells(page) if kind == "code"), names)

    rates = [2e-4, 1e-3, 5e-3, 2e-2, 6e-2]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for method, colour in (("LReg", OURS), ("LoRA", OTHERS)):
        losses = [loss_at(method, rate, names) for rate in rates]
        print(method, dict(zip(rates, losses, strict=True)))
        axes.plot(rates, losses, marker="o", color=colour, label=method)
    axes.axvline(2e-4, color="gray", linestyle=":", linewidth=1)
    axes.text(2.1e-4, axes.get_ylim()[0], " LoRA's habit", fontsize=8, va="bottom", color="gray")
    axes.set_xscale("log")
    axes.set(xlabel="learning rate (Adam)", ylabel="training loss, steps 51 to 60")
    axes.legend()
    return figure


DRAWN = {"budgets": budgets, "shortcut": shortcut, "mesh": mesh, "learning-rates": learning_rates}
TUTORIALS = sorted(page.stem for page in (DOCS / "tutorials").glob("*.md"))


def main(wanted: list[str]) -> None:
    """Draw each of them in an empty folder and keep the picture."""
    ASSETS.mkdir(exist_ok=True)
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.chdir(folder)
            if name in DRAWN:
                figure = DRAWN[name]()
                figure.savefig(f"{name}.png", dpi=100)
            else:
                run_page(DOCS / "tutorials" / f"{name}.md")
            # 64 colours are enough for lines, and a third of the bytes.
            picture = Image.open(f"{name}.png").convert("RGB").quantize(64)
            picture.save(ASSETS / f"{name}.png", optimize=True)
            os.chdir(DOCS)
        plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*DRAWN, *TUTORIALS])} (default: all)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*DRAWN, *TUTORIALS}
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}.")
    main(arguments.names or [*DRAWN, *TUTORIALS])
