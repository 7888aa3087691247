"""The encoder as a transformer, and the classifier."""

import numpy as np
import pytest
import torch
from data_sets import split
from scipy import sparse
from sklearn.datasets import load_iris, make_circles, make_moons
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from lreg_peft.core import hat_basis
from lreg_peft.regression import LagrangeClassifier, LagrangeEncoder


class TestEncoder:
    def test_is_the_hat_basis(self):
        X, _, X_test, _ = split("A2")
        encoder = LagrangeEncoder(n_nodes=7).fit(X)
        found = encoder.transform(X_test)
        assert sparse.issparse(found) and found.shape == (1500, 14) and (np.diff(found.indptr) == 4).all()
        expected = hat_basis(torch.from_numpy(X_test), torch.from_numpy(np.stack(encoder.nodes_))).flatten(1)
        np.testing.assert_allclose(found.toarray(), expected.numpy(), atol=1e-12)
        for nodes, block in zip(encoder.nodes_, (slice(0, 7), slice(7, 14)), strict=True):
            at_nodes = np.tile(nodes[:, None], 2)
            np.testing.assert_allclose(encoder.transform(at_nodes).toarray()[:, block][:, :7].sum(axis=1), 1)
        kronecker = encoder.transform(np.stack(encoder.nodes_, axis=1)).toarray()
        np.testing.assert_allclose(kronecker, np.tile(np.eye(7), 2), atol=1e-12)

    def test_outside_the_border_counts(self):
        encoder = LagrangeEncoder(n_nodes=3, sparse_output=False).fit([[0.0], [1.0], [2.0]])
        np.testing.assert_array_equal(encoder.transform([[-5.0], [9.0]]), [[1, 0, 0], [0, 0, 1]])

    def test_names_and_columns_of_few_values(self):
        encoder = LagrangeEncoder(n_nodes=4).fit(np.column_stack((np.arange(9.0), np.arange(9) % 2, np.ones(9))))
        names = list(encoder.get_feature_names_out(["a", "b", "c"]))
        assert names == ["a_hat0", "a_hat1", "a_hat2", "a_hat3", "b_hat0", "b_hat1", "c_hat0"]
        assert encoder.get_feature_names_out()[0] == "x0_hat0"
        assert encoder.transform([[0.0, 1.0, 7.0]]).toarray().tolist() == [[1, 0, 0, 0, 0, 1, 1]]

    def test_weights_are_repetitions(self):
        X = np.random.default_rng(0).uniform(size=(100, 1))
        weight = np.random.default_rng(1).integers(0, 4, 100)
        a = LagrangeEncoder(n_nodes=9).fit(X, sample_weight=weight)
        b = LagrangeEncoder(n_nodes=9).fit(np.repeat(X, weight, axis=0))
        np.testing.assert_array_equal(a.nodes_[0], b.nodes_[0])

    def test_in_a_pipeline(self):
        X, y, X_test, y_test = split("B2")
        model = make_pipeline(LagrangeEncoder(n_nodes=64), Ridge(alpha=1e-3)).fit(X[:5000], y[:5000])
        assert model.score(X_test, y_test) > 0.99

    @pytest.mark.parametrize("options", [{"n_nodes": 1}, {"n_nodes": 2.5}, {"scale": "log"}])
    def test_refusals(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            LagrangeEncoder(**options).fit([[0.0], [1.0]])


class TestClassifier:
    @pytest.mark.parametrize("make", [make_circles, make_moons])
    def test_learns_what_lines_cannot(self, make):
        X, y = make(400, noise=0.15, random_state=0, **({"factor": 0.4} if make is make_circles else {}))
        ours = cross_val_score(LagrangeClassifier(), X, y, cv=4).mean()
        assert ours > cross_val_score(LogisticRegression(), X, y, cv=4).mean() + 0.03

    def test_iris_and_the_certificate(self):
        X, y = load_iris(return_X_y=True)
        names = np.array(["setosa", "versicolor", "virginica"])[y]
        model = LagrangeClassifier().fit(X, names)
        assert model.score(X, names) > 0.96
        assert 0 <= model.optimality_.gap <= 1e-6
        assert model.classes_.tolist() == ["setosa", "versicolor", "virginica"]
        np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1)
        assert (model.predict(X) == model.classes_[model.decision_function(X).argmax(axis=1)]).all()
        assert all(entry["cross_entropy"] < np.log(3) for entry in model.history_)

    def test_straight_lines_are_logistic_regression(self):
        """Two nodes per feature: the penalised model of scikit-learn on standardised features."""
        X, y, _, _ = split("Friedman-1")
        X, label = X[:400, :3], (y[:400] > 14).astype(int)
        model = LagrangeClassifier(n_nodes=2, smoothing=0.01, interactions=0).fit(X, label)
        standard = (X - X.mean(axis=0)) / X.std(axis=0)
        reference = LogisticRegression(C=1 / (0.01 * 400), tol=1e-10, max_iter=1000).fit(standard, label)
        np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(standard), atol=1e-5)

    def test_rare_classes_and_refusals(self):
        X = np.random.default_rng(0).uniform(size=(60, 2))
        label = np.array([0] * 50 + [1] * 9 + [2])
        assert np.isfinite(LagrangeClassifier().fit(X, label).predict_proba(X)).all()
        with pytest.raises(ValueError, match="two classes"):
            LagrangeClassifier().fit(X, np.zeros(60))
        with pytest.raises(ValueError, match="smoothing must be"):
            LagrangeClassifier(smoothing=-1).fit(X, label)
        with pytest.raises(ValueError, match="n_nodes must be"):
            LagrangeClassifier(n_nodes=1).fit(X, label)
