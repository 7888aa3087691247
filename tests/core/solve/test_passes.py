"""What a certificate is about: the same samples in every pass, targets that fit, coefficients whatever."""

import warnings

import pytest
import torch

from lreg_peft.core import Chunk, solve_cross_entropy, solve_least_squares


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BASIS = gaussian(60, 4)
CLASSES = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
VALUES = gaussian(60, 3, seed=2)
START = torch.zeros(4, 3, dtype=torch.float64)


def solve(chunks, kind):
    if kind == "squares":
        return solve_least_squares(chunks, START)
    return solve_cross_entropy(chunks, START, ridge=1e-2)


def chunk(kind, rows=slice(None)):
    target = VALUES if kind == "squares" else CLASSES
    return Chunk(BASIS[rows], target[rows])


@pytest.mark.parametrize("kind", ["classes", "squares"])
class TestPasses:
    def test_an_iterator_that_is_used_up_is_an_error(self, kind):
        iterator = iter([chunk(kind)])
        with pytest.raises(ValueError, match=r"pass 2 has 0\. Give a function that begins anew"):
            solve(lambda: iterator, kind)

    def test_samples_that_go_missing_are_an_error(self, kind):
        reads = []

        def chunks():
            reads.append(1)
            yield chunk(kind, slice(0, 60 if len(reads) < 2 else 59))

        with pytest.raises(ValueError, match="pass 1 had 60, pass 2 has 59"):
            solve(chunks, kind)

    def test_other_cuts_and_another_order_are_the_same_samples(self, kind):
        reads = []

        def chunks():
            reads.append(1)
            cuts = [slice(0, 20), slice(20, 60)] if len(reads) % 2 else [slice(30, 60), slice(0, 30)]
            return [chunk(kind, cut) for cut in cuts]

        assert solve(chunks, kind).objective == pytest.approx(solve(lambda: [chunk(kind)], kind).objective, abs=1e-7)

    def test_what_is_no_chunk_is_named(self, kind):
        with pytest.raises(TypeError, match=r"chunks must give core\.Chunk"):
            solve(lambda: [(BASIS, CLASSES)], kind)
        with pytest.raises(TypeError, match="basis must be a tensor, got a list"):
            solve(lambda: [Chunk(BASIS.tolist(), CLASSES)], kind)


@pytest.mark.parametrize("value", [5.0, -100.0, 1.0001])
def test_labels_that_are_each_yes_or_no_lie_between_both(value):
    target = torch.full((60, 3), 0.5, dtype=torch.float64)
    target[7, 1] = value
    with pytest.raises(ValueError, match=r"target must lie in \[0, 1\]"):
        solve_cross_entropy(lambda: [Chunk(BASIS, target)], START, ridge=1e-2, targets="labels")


@pytest.mark.parametrize("target", [CLASSES.int(), CLASSES.bool(), CLASSES.float()])
def test_classes_are_int64(target):
    with pytest.raises(ValueError, match=r"target must be int64 \[60\]"):
        solve_cross_entropy(lambda: [Chunk(BASIS, target)], START, ridge=1e-2)


def test_infinite_options_are_refused():
    chunks = lambda: [Chunk(BASIS, CLASSES)]  # noqa: E731
    with pytest.raises(ValueError, match=r"ridge > 0, and finite, got inf"):
        solve_cross_entropy(chunks, START, ridge=float("inf"))
    with pytest.raises(ValueError, match="ridge must be at least 0 and finite, got inf"):
        solve_least_squares(chunks, START, ridge=float("inf"))
    with pytest.raises(ValueError, match="tolerance must be positive and finite"):
        solve_least_squares(chunks, START, tolerance=float("inf"))
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        solve_least_squares(chunks, START, scale=float("nan"))


class TestNearlyCollinear:
    """Columns that differ by less than the rounding of their dtype: other coefficients do better, which is said."""

    @staticmethod
    def data(dtype=torch.float32):
        first = gaussian(200, 1).float()
        nudge = torch.finfo(torch.float32).eps * first.abs() * gaussian(200, 1, seed=3).sign()
        basis = torch.cat((first, (first + nudge).float()), dim=1)
        assert not torch.equal(basis[:, 0], basis[:, 1])
        target = (basis[:, 1:].double() - basis[:, :1].double()) * 1e6 + basis[:, :1].double()
        return basis.to(dtype), target

    def test_the_result_says_what_was_left_out(self):
        basis, target = self.data()
        solved = solve_least_squares(lambda: [Chunk(basis, target)], torch.zeros(2, 1, dtype=torch.float64))
        best = torch.linalg.lstsq(basis.double(), target).solution
        least = (basis.double() @ best - target).square().mean().item() / 2
        assert least < 1e-12 < solved.objective - solved.gap  # what the gap alone would have denied
        assert solved.objective - solved.gap - solved.left_out <= least + 1e-12
        # It is the distance, not merely a bound: sums of products in fp64 leave seven digits.
        assert solved.left_out == pytest.approx(solved.objective - least, rel=1e-5)
        assert "determines 1 of 2 directions by no more than its rounding" in solved.message
        assert "a ridge above 0" in solved.message

    def test_in_double_precision_or_with_a_ridge_nothing_is_left_out(self):
        basis, target = self.data(torch.float64)
        solved = solve_least_squares(lambda: [Chunk(basis, target)], torch.zeros(2, 1, dtype=torch.float64))
        assert solved.left_out == 0 and solved.objective < 1e-12
        basis, target = self.data()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ridged = solve_least_squares(lambda: [Chunk(basis, target)], torch.zeros(2, 1), ridge=1e-8)
        assert ridged.left_out == 0 and "rounding; they" not in ridged.message
