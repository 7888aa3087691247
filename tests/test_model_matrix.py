"""The table of models and tasks in docs/reference/models.md says what is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))
import model_matrix


def test_the_page_has_every_model_that_the_tests_have():
    assert list(model_matrix.rows_of_page()) == model_matrix.MODELS


# One of each kind in every run, the others with -m slow.
QUICK = ("gpt2", "resnet")


@pytest.mark.parametrize(
    "model_type", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in model_matrix.MODELS]
)
def test_a_row_is_what_the_script_makes(model_type):
    assert model_matrix.table([model_type]).splitlines()[2] == model_matrix.rows_of_page()[model_type]
