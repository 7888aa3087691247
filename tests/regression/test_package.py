"""What comes with scikit-learn stays apart from what does without; pictures."""

import numpy as np
import pytest
from data_sets import split
from processes import run_program

import lreg_peft
from lreg_peft.regression import LagrangeClassifier, LagrangeRegressor

ASKING = """
import sys, lreg_peft
print([name for name in sys.modules if name.startswith("lreg_peft.regression")])
for missing in ("sklearn", "scipy"):
    kept = sys.modules.get(missing)
    sys.modules[missing] = None
    try:
        lreg_peft.LagrangeRegressor
    except ImportError as error:
        print(error)
    if kept is None:
        del sys.modules[missing]
    else:
        sys.modules[missing] = kept
print(lreg_peft.LagrangeRegressor.__name__)
"""


def test_the_regressor_comes_when_asked_for_and_says_what_it_needs():
    """Libraries below may import scikit-learn themselves: it is the regressor that must not come along."""
    sentence = "lreg_peft.regression needs scikit-learn and SciPy. Install them: pip install lreg_peft[regression]."
    assert run_program(ASKING).splitlines() == ["[]", sentence, sentence, "LagrangeRegressor"]
    with pytest.raises(AttributeError, match="no_such_name"):
        lreg_peft.no_such_name  # noqa: B018


def test_regression_imports_no_peft():
    from pathlib import Path

    for path in Path(lreg_peft.__file__).parent.joinpath("regression").glob("*.py"):
        text = path.read_text("utf-8")
        assert "import peft" not in text and "from peft" not in text and "transformers" not in text, path.name


class TestPictures:
    @pytest.mark.parametrize(
        ("name", "options"), [("A1", {}), ("Friedman-1", {}), ("B1", {"nodes": "free", "n_nodes": 8})]
    )
    def test_terms_are_drawn(self, name, options, tmp_path):
        pytest.importorskip("matplotlib")
        from matplotlib.collections import FillBetweenPolyCollection, QuadMesh

        X, y, _, _ = split(name)
        X, y = X[:500], y[:500]
        model = LagrangeRegressor(**options).fit(X, y)
        for arguments in ((), (X,), (X, y)):
            figure = model.plot(*arguments)
            panels = [axes for axes in figure.axes if axes.get_xlabel()]
            assert len(panels) == min(len(model.terms_), 12)
            # A band for every curve, an image for every pair.
            bands = sum(isinstance(c, FillBetweenPolyCollection) for axes in panels for c in axes.collections)
            images = sum(isinstance(c, QuadMesh) for axes in panels for c in axes.collections)
            shown = sorted(model.terms_, key=lambda term: -term.variance.sum())[:12]
            assert bands == sum(len(term.features) == 1 for term in shown)
            assert images == sum(len(term.features) == 2 for term in shown)
        figure.savefig(tmp_path / "terms.png")
        assert (tmp_path / "terms.png").stat().st_size > 1000

    def test_classes_have_bands_and_names(self):
        pytest.importorskip("matplotlib")
        random = np.random.default_rng(0)
        X = random.uniform(-1, 1, (300, 2))
        label = np.array(["low", "middle", "high"])[
            np.digitize(X[:, 0] + 0.3 * random.standard_normal(300), [-0.3, 0.3])
        ]
        model = LagrangeClassifier(interactions=0).fit(X, label)
        panel = model.plot(X).axes[0]
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["high", "low", "middle"]
        assert len(panel.collections) == 3
        two = LagrangeClassifier(interactions=0).fit(X, X[:, 0] > 0).plot().axes[0]
        assert len(two.collections) == 1

    def test_bands_hold_the_function(self):
        """Of a term with mean zero over the samples, at 95 % of its nodes; one draw of correlated errors."""
        inside = []
        for seed in range(4):
            random = np.random.default_rng(seed)
            X = random.uniform(size=(500, 2))
            y = np.sin(6 * X[:, 0]) + X[:, 1] ** 2 + 0.3 * random.standard_normal(500)
            for term in LagrangeRegressor(interactions=0, basis="additive").fit(X, y).terms_:
                f = (lambda x: np.sin(6 * x)) if term.features == (0,) else np.square
                truth = f(term.nodes[0]) - f(X[:, term.features[0]]).mean()
                inside.append((np.abs(truth - term.values[:, 0]) < 1.96 * term.deviation[:, 0]).mean())
                assert term.deviation.max() < 0.3
        assert np.mean(inside) > 0.85

    def test_models_without_terms_and_with_few_asked_for(self):
        pytest.importorskip("matplotlib")
        assert LagrangeRegressor().fit(np.ones((5, 2)), np.arange(5.0)).plot() is not None
        X, y, _, _ = split("Friedman-1")
        figure = LagrangeRegressor(interactions=0).fit(X[:300], y[:300]).plot(max_terms=3)
        assert len(figure.axes) == 3
