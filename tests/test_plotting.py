"""The picture of the meshes."""

import copy
import sys

import pytest
import torch
from peft import get_peft_model
from tiny import gpt2, inputs, layers, shake
from torch import nn

from lreg_peft import LRegConfig, plot_meshes

PATHS = ["base_model.model.transformer.h.0.mlp", "base_model.model.transformer.h.1.mlp"]


def adapted():
    model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], n_components=2, n_nodes=5))
    shake(model)
    return model


def move(model):
    for layer in layers(model):
        layer.lreg_encoder["default"].nodes.pow_(2)


class TestPlot:
    def test_before_and_after(self):
        model = adapted()
        before = copy.deepcopy(model).train()
        move(model)
        figure = plot_meshes(model, before=before, data=[inputs("gpt2")])
        panels = [panel for panel in figure.axes if panel.get_title()]
        assert [panel.get_title() for panel in panels] == [f"{path}, component {i}" for path in PATHS for i in (0, 1)]
        labels = panels[0].get_legend_handles_labels()[1]
        assert {"nodes now", "nodes before", "slope now", "slope before", "samples now", "samples before"} <= set(
            labels
        )
        old, new = (collection.get_segments() for collection in panels[0].collections)
        assert [segment[0][0] for segment in old] == pytest.approx(
            layers(before)[0].lreg_encoder["default"].nodes[0].tolist()
        )
        nodes = layers(model)[0].lreg_encoder["default"].nodes
        assert [segment[0][0] for segment in new] == pytest.approx(nodes[0].tolist())
        slope = layers(model)[0].nodal_coefficients("default")[0].diff(dim=0).norm(dim=1) / nodes[0].diff()
        (drawn,) = (patch.get_data().values for patch in panels[0].patches if patch.get_label() == "slope now")
        assert drawn == pytest.approx(slope.detach().numpy(), rel=1e-5)
        assert before.training and not any(layer._forward_hooks for layer in layers(before))

    def test_samples_are_where_their_coordinates_are(self):
        model, features = adapted(), []
        layers(model)[0].register_forward_pre_hook(lambda module, args: features.append(args[0]))
        figure = plot_meshes(model, data=[inputs("gpt2")])
        coords = layers(model)[0].coords("default", features[0]).detach()[..., 0].flatten()
        drawn = [bar.get_height() for panel in figure.axes if not panel.get_title() for bar in panel.patches][:60]
        counts = torch.histc(coords, 60, 0, 1)
        assert drawn == pytest.approx((60 * counts / counts.sum()).tolist(), rel=1e-5)  # bins of fp32

    def test_chosen_modules(self, tmp_path):
        figure = plot_meshes(adapted(), ["h.1.mlp"], max_components=1)
        (panel,) = (axes for axes in figure.axes if axes.get_title())
        assert panel.get_title().startswith(PATHS[1])
        figure.savefig(tmp_path / "meshes.png")
        assert (tmp_path / "meshes.png").stat().st_size > 10_000

    def test_errors(self, monkeypatch):
        with pytest.raises(ValueError, match="has no LReg layer"):
            plot_meshes(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"no LReg layer matches modules=\['nothing'\].*h\.0\.mlp"):
            plot_meshes(adapted(), "nothing")
        with pytest.raises(ValueError, match=r"no LReg layer matches modules=\['nothing'\].*h\.0\.mlp"):
            plot_meshes(adapted(), ["nothing"])
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot_meshes(adapted())
