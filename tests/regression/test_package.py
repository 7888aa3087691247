"""What comes with scikit-learn stays apart from what does without; pictures."""

import numpy as np
import pytest
from data_sets import split
from processes import run_program

import lreg_peft
from lreg_peft.regression import LagrangeRegressor

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
        X, y, _, _ = split(name)
        X, y = X[:500], y[:500]
        model = LagrangeRegressor(**options).fit(X, y)
        for arguments in ((), (X,), (X, y)):
            figure = model.plot(*arguments)
            panels = [axes for axes in figure.axes if axes.get_xlabel()]
            assert len(panels) == min(len(model.terms_), 12)
        figure.savefig(tmp_path / "terms.png")
        assert (tmp_path / "terms.png").stat().st_size > 1000

    def test_models_without_terms_and_with_few_asked_for(self):
        pytest.importorskip("matplotlib")
        assert LagrangeRegressor().fit(np.ones((5, 2)), np.arange(5.0)).plot() is not None
        X, y, _, _ = split("Friedman-1")
        figure = LagrangeRegressor(interactions=0).fit(X[:300], y[:300]).plot(max_terms=3)
        assert len(figure.axes) == 3


def test_verbose_shows_a_bar(capsys):
    X, y, _, _ = split("A2")
    LagrangeRegressor(verbose=True, interactions=0).fit(X[:300], y[:300])
    assert "smoothing" in capsys.readouterr().err
    LagrangeRegressor(interactions=0).fit(X[:300], y[:300])
    assert capsys.readouterr().err == ""
