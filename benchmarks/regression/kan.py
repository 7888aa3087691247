"""A Kolmogorov-Arnold network as a scikit-learn estimator, on the layers of the package `inkan`."""

from importlib import import_module
from typing import Any

import torch
from sklearn.base import BaseEstimator, RegressorMixin

_HIDDEN, _INTERVALS = 8, 20
_BATCH, _RATE = 256, 2e-2


class KolmogorovArnoldNetwork(RegressorMixin, BaseEstimator):
    """Inputs scaled to the grid, targets standardised, AdamW with a rate that falls to zero."""

    def __init__(self, steps: int = 1500, random_state: int = 0):
        self.steps = steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "KolmogorovArnoldNetwork":
        generator = torch.Generator().manual_seed(self.random_state)
        self.single_ = y.ndim == 1
        x, target = torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).reshape(len(y), -1)
        self.low_, self.span_ = x.amin(0), (x.amax(0) - x.amin(0)).clamp_min(1e-12)
        self.mean_, self.scale_ = target.mean(0), target.std(0).clamp_min(1e-12)
        x, target = self._scaled(x), (target - self.mean_) / self.scale_
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            network = import_module("inkan").KANNetwork
            self.network_ = network([x.shape[1], _HIDDEN, target.shape[1]], grid_size=_INTERVALS, compile_basis=False)
        optimizer = torch.optim.AdamW(self.network_.parameters(), lr=_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            rows = torch.randint(len(x), (_BATCH,), generator=generator)
            loss = (self.network_(x[rows]) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self

    @torch.no_grad()
    def predict(self, X: Any) -> Any:
        values = self.network_(self._scaled(torch.tensor(X, dtype=torch.float32))) * self.scale_ + self.mean_
        return (values[:, 0] if self.single_ else values).double().numpy()

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.low_) / self.span_ * 2 - 1).clamp(-1, 1)
