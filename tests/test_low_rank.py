"""The algebra of low-rank changes against dense matrices in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peta_fast.ops.low_rank import (
    DenseTiles,
    LowRank,
    aligned,
    distance,
    linear_peft,
    norm_of,
    refactored,
    spectrum,
    stacked,
    truncated,
)

# The adapters of methods.md's worked example: s = 2, A0 = [.5 -.25], two tasks.
TASKS = [LowRank(torch.tensor([[0.8], [-0.4]]), torch.tensor([[0.6, -0.05]])),
         LowRank(torch.tensor([[-0.2], [1.0]]), torch.tensor([[0.3, -0.45]]))]  # fmt: skip
shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))
some = settings(deadline=None, max_examples=40)
ranks = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def changes(shape: tuple[int, int], ranks: list[int], seed: int = 0, dtype=torch.float32) -> list[LowRank]:
    draw = torch.Generator().manual_seed(seed)
    m, n = shape
    return [
        LowRank(torch.randn(m, r, generator=draw).to(dtype), torch.randn(r, n, generator=draw).to(dtype)) for r in ranks
    ]


def dense(terms: list[LowRank], weights: list[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(terms)
    return sum(w * t.B.double() @ t.A.double() for w, t in zip(weights, terms, strict=True))


def norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix).item()


@some
@given(shapes, ranks, st.integers(0, 100))
def test_stacked_factors_are_the_weighted_sum(shape, ranks, seed):
    terms = changes(shape, ranks, seed)
    weights = [0.5, -2.0, 1.0, 0.3][: len(terms)]
    found = stacked(terms, weights)
    assert found.rank == sum(ranks)
    assert norm(found.dense().double() - dense(terms, weights)) <= 1e-6 * max(1.0, norm(dense(terms, weights)))


@some
@given(shapes, ranks, st.integers(1, 20), st.integers(0, 100))
def test_a_truncation_is_the_best_and_says_its_error(shape, ranks, rank, seed):
    total = stacked(changes(shape, ranks, seed, torch.float64))
    exact = total.dense()
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = truncated(total, rank, dtype)
        assert found.change.rank == min(rank, total.rank, *shape) and found.change.A.dtype == dtype
        assert found.norm == pytest.approx(norm(exact), rel=1e-10)
        measured = norm(found.change.B.double() @ found.change.A.double() - exact)
        assert found.error == pytest.approx(measured, rel=1e-3, abs=1e-6 * norm(exact))
        assert found.energy == pytest.approx(1 - (measured / norm(exact)) ** 2, abs=1e-5)
    best = S[rank:].square().sum().sqrt().item()
    assert truncated(total, rank, torch.float64).error == pytest.approx(best, abs=1e-9 * norm(exact))


@some
@given(shapes, ranks, st.integers(0, 100))
def test_the_spectrum_is_that_of_the_dense_matrix(shape, ranks, seed):
    total = stacked(changes(shape, ranks, seed, torch.float64))
    found, exact = spectrum(total), total.dense()
    k = found.S.numel()
    torch.testing.assert_close(found.S, torch.linalg.svdvals(exact)[:k], rtol=1e-9, atol=1e-9 * norm(exact))
    torch.testing.assert_close(found.left(k) * found.S @ found.right(k).T, exact, rtol=0, atol=1e-9 * norm(exact))


@some
@given(shapes, ranks, ranks, st.integers(0, 100))
def test_a_distance_needs_no_dense_matrix(shape, ranks, others, seed):
    a, b = (stacked(changes(shape, r, s)) for r, s in ((ranks, seed), (others, seed + 1)))
    exact = norm(dense([a]) - dense([b]))
    assert distance(a, b) == pytest.approx(exact, rel=1e-9, abs=1e-12 * norm(dense([a])))
    assert norm_of(a) == pytest.approx(norm(dense([a])), rel=1e-9)


def test_a_distance_of_nearly_equal_changes_does_not_cancel():
    (a,) = changes((200, 150), [8], dtype=torch.float64)
    b = LowRank(a.B + 1e-12, a.A)
    assert distance(a, b) == pytest.approx(norm((b.B - a.B) @ a.A), rel=1e-2)


def test_the_worked_example_of_cat_and_linear():
    half = stacked(TASKS, [0.5, 0.5])
    torch.testing.assert_close(half.dense(), torch.tensor([[0.21, 0.025], [0.03, -0.215]]))
    plain = [(t.B / 2, t.A) for t in TASKS]
    torch.testing.assert_close(linear_peft(plain, [1.0, 1.0]).dense(), torch.tensor([[0.27, -0.15], [0.27, -0.15]]))


def test_linear_differs_by_its_cross_terms():
    one, two = [(t.B, t.A) for t in changes((9, 7), [3, 3], dtype=torch.float64)]
    found = linear_peft([one, two], [0.5, -0.8])
    cross = math.sqrt(0.4) * (-one[0] @ two[1] + two[0] @ one[1])
    exact = 0.5 * one[0] @ one[1] - 0.8 * two[0] @ two[1]
    torch.testing.assert_close(found.dense(), exact + cross)


def test_the_worked_example_of_knots():
    found = aligned(TASKS)
    S = torch.stack([rep.square().sum(1) for rep in found.reps]).sum(0).sqrt()
    torch.testing.assert_close(S, torch.tensor([0.692523, 0.338544], dtype=torch.float64), atol=1e-6, rtol=0)


@some
@given(shapes, ranks, st.integers(0, 50))
def test_knots_in_factored_form_is_the_stacked_svd(shape, ranks, seed):
    terms = changes(shape, ranks, seed, torch.float64)
    found = aligned(terms)
    stack = torch.cat([t.dense() for t in terms], 1)
    S = torch.linalg.svdvals(stack)
    S = S[S > 1e-5]
    ours = torch.cat(found.reps, 1)
    torch.testing.assert_close(torch.linalg.vector_norm(ours, dim=1)[: len(S)], S, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(found.U.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)
    for term, rep in zip(terms, found.reps, strict=True):
        torch.testing.assert_close(found.U @ rep, term.dense(), rtol=0, atol=2e-5 * len(S) + 1e-9)
    mean = found.change(sum(found.reps) / len(terms)).dense()
    torch.testing.assert_close(mean, dense(terms) / len(terms), rtol=0, atol=2e-5 * len(S) + 1e-9)


def test_a_task_without_a_change_is_zero_in_the_common_basis():
    (a,) = changes((6, 5), [2], dtype=torch.float64)
    found = aligned([None, a])
    assert not found.reps[0].any()
    torch.testing.assert_close(found.U @ found.reps[1], a.dense())


class CountedTiles:
    """A matrix in runs of 7 rows; counts how often it is read."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.shape, self.readings = matrix, tuple(matrix.shape), 0

    def __iter__(self):
        self.readings += 1
        for row in range(0, self.shape[0], 7):
            yield row, self.matrix[row : row + 7]


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (20, 300), (300, 20), (5, 4)], ids=str)
def test_a_sketch_is_nearly_the_best_and_measures_its_error(shape):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=draw) + 3 * stacked(changes(shape, [6])).dense()
    tiles = CountedTiles(matrix)
    S = torch.linalg.svdvals(matrix.double())
    rank = min(4, *shape)
    found = refactored(tiles, rank)
    best = S[rank:].square().sum().sqrt().item()
    measured = norm(matrix.double() - found.change.B.double() @ found.change.A.double())
    assert found.error == pytest.approx(measured, rel=1e-4, abs=1e-5 * found.norm)
    assert best * (1 - 1e-6) <= measured <= 1.01 * best + 1e-5 * found.norm
    assert found.norm == pytest.approx(norm(matrix.double()), rel=1e-5)
    assert tiles.readings <= 5


def test_a_sketch_of_a_low_rank_matrix_is_exact_to_rounding():
    matrix = stacked(changes((150, 130), [5])).dense()
    found = refactored(DenseTiles(matrix), 5)
    assert found.error < 1e-6 * found.norm and found.energy > 1 - 1e-11


def test_a_sketch_depends_on_tiles_and_seed_in_rounding_alone():
    matrix = stacked(changes((150, 130), [9])).dense()
    a, b, c = (
        refactored(t, 4, seed=s).change
        for t, s in ((DenseTiles(matrix), 0), (CountedTiles(matrix), 0), (DenseTiles(matrix), 1))
    )
    assert distance(a, b) < 1e-5 * norm_of(a) and distance(a, c) < 1e-2 * norm_of(a)


def test_the_fewest_ranks_that_keep_an_energy():
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(40, 6, generator=draw)).Q for _ in range(2))
    matrix = U @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])) @ V.T
    total = 64 + 16 + 4 + 1 + 0.25 + 0.0625
    for energy, kept in ((0.5, 1), (64 / total + 1e-4, 2), (0.98, 3), (1.0, 5)):
        found = refactored(DenseTiles(matrix), 5, energy=energy)
        assert found.change.rank == kept, energy


def test_a_matrix_of_zeros_has_no_error():
    found = refactored(DenseTiles(torch.zeros(30, 20)), 3)
    assert found.error == 0 and found.energy == 1 and not found.change.dense().any()
    zero = truncated(LowRank(torch.zeros(5, 2), torch.zeros(2, 4)), 2)
    assert zero.error == 0 and zero.energy == 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="rank of at least 1"):
        truncated(TASKS[0], 0)
    with pytest.raises(ValueError, match="rank of at least 1"):
        refactored(DenseTiles(torch.zeros(3, 3)), 0)
    with pytest.raises(ValueError, match="finite"):
        refactored(DenseTiles(torch.full((30, 30), torch.nan)), 2)
    with pytest.raises(ValueError, match="one rank"):
        linear_peft([(torch.zeros(3, 2), torch.zeros(2, 3)), (torch.zeros(3, 1), torch.zeros(1, 3))], [1, 1])
    with pytest.raises(ValueError, match="of one shape"):
        stacked([*changes((3, 4), [1]), *changes((4, 3), [1])])
    with pytest.raises(ValueError, match="expected factors"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 2))
