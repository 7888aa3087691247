"""Optimality of the convex solvers: against other solvers, against their own certificate, and what a solve costs."""

import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.utils._python_dispatch import TorchDispatchMode

from lreg_peft.core import (
    Chunk,
    Processes,
    hat_basis,
    quantile_nodes,
    solve_cross_entropy,
    solve_least_squares,
)
from lreg_peft.core.solve import cross_entropy as entropy_module

RIDGE = 1e-4


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(logits, seed=1):
    """Labels from the distributions that the logits give."""
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits - (-noise.log()).log()).argmax(1)


def random_classes(n=800, features=12, classes=5):
    basis = gaussian(n, features)
    return basis, drawn(3 * basis @ gaussian(features, classes, seed=2) / features**0.5)


def separable():
    basis = gaussian(600, 10)
    return basis, (basis @ gaussian(10, 4, seed=3)).argmax(1)


def badly_conditioned():
    """Condition number 1e8 in no special directions."""
    scales = torch.logspace(0, -8, 12, dtype=torch.float64)
    turn = torch.linalg.qr(gaussian(12, 12, seed=4)).Q
    basis = gaussian(800, 12) * scales @ turn
    return basis, drawn(basis @ turn.T @ gaussian(12, 5, seed=5) * 3)


def long_tailed(n=2500, features=16, classes=2000):
    basis = gaussian(n, features)
    prior = -torch.arange(1, classes + 1, dtype=torch.float64).log()
    return basis, drawn(prior + basis @ gaussian(features, classes, seed=6) / 2)


def chunks_of(*tensors, rows=251):
    """Chunks of an odd size, with a count of how often they were read."""

    def chunks():
        chunks.reads += 1
        for first in range(0, len(tensors[0]), rows):
            yield Chunk(*(None if t is None else t[first : first + rows] for t in tensors))

    chunks.reads = 0
    return chunks


def zeros(features, outputs, dtype=torch.float64):
    return torch.zeros(features, outputs, dtype=dtype)


def cross_entropy(c, basis, target, offset=0, ridge=RIDGE):
    """P written down once more."""
    return torch.nn.functional.cross_entropy(basis @ c + offset, target) + ridge / 2 * c.square().sum()


def squares(c, basis, target, offset=0, ridge=0.0):
    return (basis @ c + offset - target).square().sum(1).mean() / 2 + ridge / 2 * c.square().sum()


PROBLEMS = [random_classes, separable, badly_conditioned]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_agrees_with_scikit_learn(problem, dtype):
    basis, target = problem()
    classes = int(target.max()) + 1
    solved = solve_cross_entropy(
        chunks_of(basis.to(dtype), target), zeros(basis.shape[1], classes, dtype), ridge=RIDGE, tolerance=1e-8
    )
    other = LogisticRegression(C=1 / (RIDGE * len(basis)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    theirs = cross_entropy(torch.tensor(other.fit(basis, target).coef_.T), basis, target).item()
    assert solved.status == "converged" and solved.gap <= 1e-8
    assert solved.objective == pytest.approx(theirs, rel=1e-6)
    assert cross_entropy(solved.coefficients.double(), basis, target).item() == pytest.approx(theirs, rel=1e-6)


def test_yes_or_no_labels_agree_with_scikit_learn():
    basis, target = random_classes(classes=2)
    solved = solve_cross_entropy(
        chunks_of(basis, target.double().unsqueeze(1)), zeros(12, 1), ridge=RIDGE, targets="labels", tolerance=1e-9
    )
    other = LogisticRegression(C=1 / (RIDGE * len(basis)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit(basis, target)
    np.testing.assert_allclose(solved.coefficients.T, other.coef_, atol=1e-3)
    signs = 2 * target.double().unsqueeze(1) - 1
    theirs = torch.nn.functional.softplus(-signs * (basis @ torch.tensor(other.coef_.T))).mean()
    theirs += RIDGE / 2 * np.square(other.coef_).sum()
    assert solved.objective == pytest.approx(float(theirs), rel=1e-6)


def test_several_labels_are_several_problems():
    basis, first = random_classes(classes=2)
    labels = torch.stack((first.double(), (basis[:, 0] > 0.3).double()), dim=1)
    together = solve_cross_entropy(
        chunks_of(basis, labels), zeros(12, 2), ridge=RIDGE, targets="labels", tolerance=1e-10
    )
    apart = [
        solve_cross_entropy(
            chunks_of(basis, labels[:, i : i + 1]), zeros(12, 1), ridge=RIDGE, targets="labels", tolerance=1e-10
        )
        for i in range(2)
    ]
    assert together.objective == pytest.approx(sum(solved.objective for solved in apart), rel=1e-8)


@pytest.mark.parametrize("problem", [*PROBLEMS, partial(long_tailed, 600, 8, 200)])
def test_the_gap_bounds_the_distance_from_the_optimum(problem):
    basis, target = problem()
    classes = max(5, int(target.max()) + 1)
    offset = gaussian(len(basis), classes, seed=8)
    chunks = chunks_of(basis, target, offset)
    best = solve_cross_entropy(chunks, zeros(basis.shape[1], classes), ridge=RIDGE, tolerance=1e-10)
    for passes in (3, 5, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            early = solve_cross_entropy(
                chunks, zeros(basis.shape[1], classes), ridge=RIDGE, tolerance=1e-10, max_passes=passes
            )
        if early.status != "converged":
            assert best.objective <= early.objective <= best.objective + best.gap + early.gap


def test_the_offset_enters_as_written_down():
    basis, target = random_classes()
    offset = gaussian(800, 5, seed=9)
    solved = solve_cross_entropy(chunks_of(basis, target, offset), zeros(12, 5), ridge=RIDGE, tolerance=1e-12)
    c = solved.coefficients.clone().requires_grad_()
    value = cross_entropy(c, basis, target, offset)
    value.backward()
    assert solved.objective == pytest.approx(value.item(), rel=1e-12)
    assert solved.gradient_norm == pytest.approx(c.grad.norm().item(), rel=1e-3)
    assert c.grad.square().sum().item() / (2 * RIDGE) <= 1.01e-12


@pytest.mark.parametrize("kind", ["cross-entropy", "squares"])
def test_the_scale_belongs_to_the_data_term(kind):
    basis, target = random_classes()
    solve = partial(solve_cross_entropy, tolerance=1e-11)
    if kind == "squares":
        solve, target = solve_least_squares, gaussian(800, 5)
    plain = solve(chunks_of(basis, target), zeros(12, 5), ridge=0.02)
    scaled = solve(chunks_of(basis, target), zeros(12, 5), ridge=0.01, scale=0.5)
    torch.testing.assert_close(scaled.coefficients, plain.coefficients, rtol=0, atol=1e-4)
    assert scaled.objective == pytest.approx(plain.objective / 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_more_passes_than_allowed(dtype):
    """Whatever the solver is doing when they run out: L-BFGS, another precision, Newton-CG."""
    basis = hats(400, 12, 6)
    target = drawn(basis @ gaussian(72, 4, seed=2))
    for passes in (3, 4, 5, 20, 45, 70, 90):
        chunks = chunks_of(basis.to(dtype), target, rows=400)
        with pytest.warns(RuntimeWarning, match="max_passes"):
            solved = solve_cross_entropy(chunks, zeros(72, 4, dtype), ridge=1e-7, tolerance=1e-9, max_passes=passes)
        assert passes - 2 <= solved.passes == chunks.reads <= passes
        assert solved.status == "iteration_limit"
    assert "Newton" in solved.method


@pytest.mark.parametrize("targets", ["classes", "labels"])
def test_products_with_the_hessian_are_derivatives_of_the_gradient(targets):
    basis, target = random_classes(n=60)
    target = target if targets == "classes" else torch.nn.functional.one_hot(target).double()
    chunks = chunks_of(basis, target, gaussian(60, 5, seed=9), rows=17)
    objective = entropy_module._Objective(chunks, (12, 5), targets, RIDGE, entropy_module.Processes())
    c, direction = gaussian(12, 5, seed=11), gaussian(12, 5, seed=12)
    ahead, behind = (objective.evaluate(c + s * direction, torch.float64).gradient for s in (1e-5, -1e-5))
    product = objective.hessian_product(c, direction, torch.float64)
    # Central differences: truncation about 1e-10, rounding about 1e-16 / 1e-5.
    torch.testing.assert_close(product, (ahead - behind) / 2e-5, rtol=0, atol=1e-9)


def hats(n, components, n_nodes):
    coords = torch.sigmoid(1.7 * gaussian(n, components))
    return hat_basis(coords, quantile_nodes(coords, n_nodes)).flatten(1)


@pytest.mark.parametrize(
    ("problem", "classes", "limit"),
    [(partial(random_classes, 5000, 128, 20), 20, 30), (long_tailed, 2000, 45)],
    ids=["20 classes, 128 features", "2000 Zipf classes, 16 features"],
)
def test_passes_to_the_certificate(problem, classes, limit):
    basis, target = problem()
    chunks = chunks_of(basis.float(), target, rows=1000)
    solved = solve_cross_entropy(chunks, zeros(basis.shape[1], classes, torch.float32), ridge=1e-4, tolerance=1e-6)
    assert solved.status == "converged" and solved.gap <= 1e-6
    assert solved.passes == chunks.reads <= limit


def test_a_newton_finish_where_lbfgs_crawls():
    """Hat functions of many components at a small ridge; the products of the finish are counted."""
    basis = hats(1000, 16, 8)
    target = drawn(basis @ gaussian(128, 8, seed=2))
    chunks = chunks_of(basis, target, rows=1000)
    solved = solve_cross_entropy(chunks, zeros(128, 8), ridge=1e-6)
    assert "Newton" in solved.method and solved.status == "converged"
    assert solved.passes == chunks.reads > solved.iterations + 10


def test_an_earlier_solution_is_a_better_start():
    basis, target = random_classes()
    chunks = chunks_of(basis, target)
    cold = solve_cross_entropy(chunks, zeros(12, 5), ridge=RIDGE)
    warm = solve_cross_entropy(chunks, cold.coefficients + 1e-3 * gaussian(12, 5), ridge=RIDGE)
    again = solve_cross_entropy(chunks, cold.coefficients, ridge=RIDGE)
    assert again.passes < warm.passes < cold.passes
    assert warm.objective == pytest.approx(cold.objective, abs=1e-6)


def test_the_certificate_is_about_the_rounded_coefficients():
    """Here fp32 coefficients cannot come within 1e-6 of the optimum, which the result says."""
    basis, target = badly_conditioned()
    exact = solve_cross_entropy(chunks_of(basis, target), zeros(12, 5), ridge=1e-11, max_passes=2000)
    with pytest.warns(RuntimeWarning, match="keep the coefficients in fp64"):
        rounded = solve_cross_entropy(
            chunks_of(basis, target), zeros(12, 5, torch.float32), ridge=1e-11, max_passes=2000
        )
    assert rounded.status == "stalled"
    assert rounded.gap > 1e-6 >= exact.gap
    c = rounded.coefficients
    assert c.dtype == torch.float32
    value = cross_entropy(c.double(), basis, target, ridge=1e-11).item()
    assert rounded.objective == pytest.approx(value, rel=1e-14)


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation returned, in entries."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("features", [4, 64])
def test_memory_does_not_grow_with_samples_times_classes(features):
    n, classes, entries = 600, 8192, 1 << 21
    basis = gaussian(n, features).float()
    target = torch.randint(classes, (n,))
    chunks = chunks_of(basis, target, rows=n)  # one chunk, which the solver has to cut
    with Allocations() as seen, pytest.warns(RuntimeWarning, match="max_passes"):
        solve_cross_entropy(chunks, zeros(features, classes, torch.float32), ridge=1e-4, max_passes=5)
    coefficients = features * classes
    assert entries // 2 < seen.largest <= max(entries, 2 * coefficients + classes)  # the gradient as it is sent
    assert seen.largest < n * classes


def test_not_reaching_the_tolerance_is_said():
    basis, target = random_classes()
    with pytest.warns(RuntimeWarning, match="raise max_passes"):
        solved = solve_cross_entropy(chunks_of(basis, target), zeros(12, 5), ridge=RIDGE, max_passes=4)
    assert solved.status == "iteration_limit" and solved.gap > 1e-6 and solved.passes <= 4
    with pytest.warns(RuntimeWarning, match="raise tolerance or ridge"):
        solved = solve_cross_entropy(chunks_of(basis, target), zeros(12, 5), ridge=RIDGE, tolerance=1e-40)
    assert solved.status == "stalled" and solved.gap < 1e-20


def test_progress_is_reported_after_every_pass_of_the_descent():
    basis, target = random_classes()
    reports = []
    solved = solve_cross_entropy(
        chunks_of(basis, target), zeros(12, 5), ridge=RIDGE, report=lambda *numbers: reports.append(numbers)
    )
    assert [passes for passes, _, _ in reports] == list(range(1, solved.passes + 1))
    assert reports[-1][1:] == (solved.objective, solved.gap)


# Least squares


@pytest.mark.parametrize("rows", [97, 5000])
def test_least_squares_agrees_with_lstsq(rows):
    basis, target = gaussian(700, 9), gaussian(700, 3, seed=1)
    solved = solve_least_squares(chunks_of(basis, target, rows=rows), zeros(9, 3))
    theirs = torch.tensor(np.linalg.lstsq(basis.numpy(), target.numpy(), rcond=None)[0])
    torch.testing.assert_close(solved.coefficients, theirs, rtol=1e-10, atol=1e-12)
    assert solved.objective == pytest.approx(squares(theirs, basis, target).item(), rel=1e-12)
    assert solved.status == "converged" and solved.gap <= 1e-20 and solved.passes == 2
    assert solved.method == "normal equations"


def test_least_squares_with_everything():
    basis, target = gaussian(400, 7), gaussian(400, 2, seed=1)
    offset, start = gaussian(400, 2, seed=2), gaussian(7, 2, seed=4)
    solved = solve_least_squares(chunks_of(basis, target, offset), start, ridge=0.3)
    normal = basis.T @ basis / 400 + 0.3 * torch.eye(7, dtype=torch.float64)
    theirs = torch.linalg.solve(normal, basis.T @ (target - offset) / 400)
    torch.testing.assert_close(solved.coefficients, theirs, rtol=1e-11, atol=1e-12)
    value = squares(theirs, basis, target, offset, ridge=0.3).item()
    assert solved.objective == pytest.approx(value, rel=1e-12)


def test_ill_conditioned_least_squares_takes_the_qr_path():
    basis, _ = badly_conditioned()
    target = gaussian(800, 2, seed=1)
    chunks = chunks_of(basis, target)
    solved = solve_least_squares(chunks, zeros(12, 2))
    theirs = torch.tensor(np.linalg.lstsq(basis.numpy(), target.numpy(), rcond=None)[0])
    assert solved.method == "QR" and "QR" in solved.message
    assert solved.passes == chunks.reads == 3
    assert solved.gap <= 1e-6
    assert solved.objective == pytest.approx(squares(theirs, basis, target).item(), rel=1e-6)


def test_normal_equations_alone_would_have_missed_it():
    basis, _ = badly_conditioned()
    target = basis @ gaussian(12, 2, seed=1) * 1e6
    exact = solve_least_squares(chunks_of(basis, target), zeros(12, 2), tolerance=1e-18)
    assert exact.method == "QR"
    normal = torch.linalg.solve(basis.T @ basis, basis.T @ target)
    assert squares(normal, basis, target) > 10 * exact.objective


def test_directions_without_samples_stay_and_the_norm_is_smallest():
    basis = hats(500, 3, 4)  # each component sums to one: two directions are redundant
    target = gaussian(500, 2, seed=1)
    solved = solve_least_squares(chunks_of(basis, target), zeros(12, 2))
    theirs = torch.tensor(np.linalg.lstsq(basis.numpy(), target.numpy(), rcond=None)[0])
    assert solved.method == "QR"
    torch.testing.assert_close(solved.coefficients, theirs, rtol=1e-8, atol=1e-9)
    ridged = solve_least_squares(chunks_of(basis, target), zeros(12, 2), ridge=1e-3)
    assert ridged.method == "normal equations" and ridged.coefficients.norm() < theirs.norm()


def test_rounding_of_the_basis_determines_nothing():
    """In fp32 the components' sums differ by rounding, which coefficients of 1e7 could use to fit some noise."""
    basis, target = hats(500, 3, 4).float(), gaussian(500, 2, seed=1)
    solved = solve_least_squares(chunks_of(basis, target), zeros(12, 2))
    assert solved.status == "converged" and solved.coefficients.abs().max() < 10


def test_the_gap_of_least_squares_is_the_distance():
    basis, target = gaussian(300, 5), gaussian(300, 2, seed=1)
    best = solve_least_squares(chunks_of(basis, target), zeros(5, 2), ridge=0.1)
    coarse = solve_least_squares(chunks_of(basis, target), zeros(5, 2, torch.bfloat16), ridge=0.1, tolerance=1e-3)
    assert coarse.gap > 1e-9
    assert coarse.objective - best.objective == pytest.approx(coarse.gap, rel=1e-6)


def test_least_squares_says_what_it_could_not_do():
    basis, target = gaussian(300, 5), gaussian(300, 2, seed=1)
    with pytest.warns(RuntimeWarning, match="keep the coefficients in fp64"):
        solved = solve_least_squares(chunks_of(basis, target), zeros(5, 2, torch.bfloat16), tolerance=1e-9)
    assert solved.status == "stalled" and solved.gap > 1e-9


class Threads(Processes):
    """Two threads that act as two processes."""

    meeting = threading.Barrier(2, timeout=60)
    board: ClassVar = [None, None]

    def __init__(self, rank):
        self.rank = rank

    def gather(self, tensor):
        self.board[self.rank] = tensor
        self.meeting.wait()
        parts = list(self.board)
        self.meeting.wait()
        return parts

    def total(self, tensor):
        return sum(self.gather(tensor))


@pytest.mark.parametrize("kind", ["cross-entropy", "normal equations", "QR"])
def test_two_shares_of_the_samples_give_the_solution_of_all(kind):
    basis, target = badly_conditioned() if kind == "QR" else random_classes()
    if kind == "cross-entropy":
        solve = partial(solve_cross_entropy, start=zeros(12, 5), ridge=RIDGE, tolerance=1e-12)
    else:
        solve, target = partial(solve_least_squares, start=zeros(12, 2)), gaussian(800, 2)
    together = solve(chunks_of(basis, target))
    with ThreadPoolExecutor(2) as pool:
        shares = [slice(0, 300), slice(300, None)]
        chunks = [chunks_of(basis[share], target[share]) for share in shares]
        first, second = pool.map(lambda rank: solve(chunks[rank], processes=Threads(rank)), range(2))
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.passes == second.passes and first.objective == second.objective
    assert first.method == together.method
    assert first.objective == pytest.approx(together.objective, rel=1e-9)


@pytest.mark.parametrize("solve", [partial(solve_cross_entropy, targets="labels", ridge=RIDGE), solve_least_squares])
def test_the_samples_are_left_as_they_are(solve):
    data = [gaussian(50, 3), gaussian(50, 2).sigmoid(), gaussian(50, 2), zeros(3, 2)]
    before = [tensor.clone() for tensor in data]
    solve(lambda: [Chunk(*data[:3])], data[3])
    assert all(map(torch.equal, data, before))


BAD = {
    "there are no samples": lambda b, t: (b[:0], t[:0]),
    "basis must be finite": lambda b, t: (torch.cat((b[:-1], b[-1:] * torch.nan)), t),
    "basis must be fp32 or fp64 [n, 12]": lambda b, t: (b[:, :4], t),
    "offset must have shape [n, outputs] = (800, 5)": lambda b, t: (b, t, b),
    "offset must be finite": lambda b, t: (b, t, b[:, :5] / 0),
}


@pytest.mark.parametrize(("message", "spoil"), BAD.items(), ids=BAD)
@pytest.mark.parametrize("kind", ["classes", "labels", "squares"])
def test_bad_data_are_named(message, spoil, kind):
    basis, target = random_classes()
    if kind != "classes":
        target = torch.nn.functional.one_hot(target).double()
    chunks = chunks_of(*spoil(basis, target), rows=800)
    solve = solve_least_squares if kind == "squares" else partial(solve_cross_entropy, targets=kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(chunks, zeros(12, 5), ridge=RIDGE)


def test_bad_labels_are_named():
    basis, target = random_classes()
    for wrong in (target - 1, target + 1):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\] for 5 classes, got values from"):
            solve_cross_entropy(chunks_of(basis, wrong, rows=800), zeros(12, 5), ridge=RIDGE)
    for wrong in (target.double(), target[:10], target.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"target must be int64 \[800\]"):
            solve_cross_entropy(lambda wrong=wrong: [Chunk(basis, wrong)], zeros(12, 5), ridge=RIDGE)
    with pytest.raises(ValueError, match="target must be floating point"):
        solve_least_squares(chunks_of(basis, target), zeros(12, 5))


def test_bad_options_are_named():
    basis, target = random_classes()
    chunks = chunks_of(basis, target)
    for ridge in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="cross-entropy needs ridge > 0"):
            solve_cross_entropy(chunks, zeros(12, 5), ridge=ridge)
    with pytest.raises(ValueError, match="ridge must be at least 0"):
        solve_least_squares(chunks, zeros(12, 5), ridge=-1)
    with pytest.raises(ValueError, match="targets must be 'classes' or 'labels'"):
        solve_cross_entropy(chunks, zeros(12, 5), ridge=1, targets="class")
    with pytest.raises(ValueError, match="tolerance must be positive"):
        solve_cross_entropy(chunks, zeros(12, 5), ridge=1, tolerance=0)
    with pytest.raises(ValueError, match="max_passes must be at least 3"):
        solve_cross_entropy(chunks, zeros(12, 5), ridge=1, max_passes=2)
    with pytest.raises(ValueError, match="start must be finite"):
        solve_cross_entropy(chunks, zeros(12, 5) / 0, ridge=1)
    with pytest.raises(ValueError, match="start must be floating point"):
        solve_cross_entropy(chunks, zeros(12, 5).long(), ridge=1)
    assert chunks.reads == 0
