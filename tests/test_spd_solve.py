"""Gram matrices, packed; linear systems solved directly and by conjugate gradients, against dense solves in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peta_fast.ops import gram as grams
from peta_fast.ops.kronecker_sum import PRECONDITIONERS, KroneckerSum, solve_kronecker_sum
from peta_fast.ops.spd_solve import cholesky_solve, conjugate_gradients

F64 = torch.float64
W1 = torch.eye(2, dtype=F64)
W2 = torch.tensor([[3, 2], [1, -1]], dtype=F64)
G1 = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 5 / 3]], dtype=F64)
G2 = torch.tensor([[5 / 3, 1 / 3], [1 / 3, 1]], dtype=F64)
O1 = torch.tensor([[0.52, 0.15], [0.15, 0.625]], dtype=F64)
O2 = torch.tensor([[0.625, 0.125], [0.125, 0.125]], dtype=F64)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(n: int, seed: int, rows: int | None = None) -> Tensor:
    """A Gram matrix of `rows` rows with columns of unequal size."""
    x = torch.randn(rows or 3 * n, n, generator=draw(seed), dtype=F64) * torch.logspace(0, -1, n, dtype=F64)
    return x.T @ x / len(x)


def family(out: int, width: int, tasks: int):
    """(inputs, outputs, weights) of `tasks` tasks."""
    inputs = [spd(width, 10 + t) for t in range(tasks)]
    outputs = [spd(out, 20 + t) for t in range(tasks)]
    weights = [torch.randn(out, width, generator=draw(30 + t), dtype=F64) for t in range(tasks)]
    return inputs, outputs, weights


def dense_solution(inputs, outputs, weights) -> Tensor:
    """By one system in all elements: (sum O_t kron G_t) vec(W), rows of W one after another."""
    matrix = sum(np.kron(o.numpy(), g.numpy()) for o, g in zip(outputs, inputs, strict=True))
    right = sum((o @ w @ g).numpy() for o, w, g in zip(outputs, weights, inputs, strict=True))
    return torch.from_numpy(np.linalg.solve(matrix, right.reshape(-1)).reshape(right.shape))


def right_side(inputs, outputs, weights) -> Tensor:
    return sum(o @ w @ g for o, w, g in zip(outputs, weights, inputs, strict=True))


def simultaneous_solution(inputs, outputs, weights) -> Tensor:
    """Two tasks: G_1 = P P^T, G_2 = P D P^T, O_1 = Q Q^T, O_2 = Q E Q^T, then a division by 1 + E_i D_j."""

    def joint(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.linalg.cholesky(a)
        inverse = torch.linalg.inv(root)
        values, vectors = torch.linalg.eigh(inverse @ b @ inverse.T)
        return root @ vectors, values

    p, d = joint(*inputs)
    q, e = joint(*outputs)
    right = torch.linalg.solve(p, torch.linalg.solve(q, right_side(inputs, outputs, weights)).T).T
    return torch.linalg.solve(q.T, right / (1 + e[:, None] * d)) @ torch.linalg.inv(p)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 513])
def test_packing_keeps_the_upper_triangle_row_by_row(n):
    full = spd(n, 0) if n else torch.empty(0, 0, dtype=F64)
    packed = grams.pack(full)
    assert torch.equal(packed, full[torch.triu_indices(n, n).unbind()])
    assert torch.equal(grams.unpack(packed), full.triu() + full.triu(1).T)


def test_a_size_that_is_no_triangle_is_refused():
    with pytest.raises(ValueError, match="n \\(n \\+ 1\\) / 2"):
        grams.unpack(torch.zeros(4))


@pytest.mark.parametrize("n, rows", [(3, 5), (512, 40), (700, 33), (1100, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grams_add_up_over_blocks(n, rows, dtype):
    x = torch.randn(2, rows, n, generator=draw()).to(dtype)
    total = torch.zeros(n, n)
    for part in x:
        grams.add_gram(total, part)
    exact = x.reshape(-1, n).double().T @ x.reshape(-1, n).double()
    error = (grams.unpack(grams.pack(total)).double() - exact).abs().max()
    assert error <= 2e-6 * rows


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), factor=st.floats(0, 1), seed=st.integers(0, 1000))
def test_scaling_leaves_the_diagonal(n, factor, seed):
    full = spd(n, seed)
    scaled = grams.scale_off_diagonal(full.clone(), factor)
    torch.testing.assert_close(scaled, factor * full + (1 - factor) * full.diagonal().diag(), rtol=1e-12, atol=1e-15)


def test_cholesky_is_the_dense_solution():
    gram, right = spd(40, 0), torch.randn(7, 40, generator=draw(), dtype=F64)
    solved = cholesky_solve(gram, right, torch.ones(7, 40, dtype=F64))
    torch.testing.assert_close(solved.value, torch.linalg.solve(gram, right.T).T, rtol=1e-9, atol=1e-9)
    assert (solved.ridge, solved.unseen) == (0, 0)


def test_inputs_that_are_never_seen_keep_the_start():
    gram, kept = spd(6, 0), torch.tensor([0, 2, 3, 5])
    gram[[1, 4]], gram[:, [1, 4]] = 0, 0
    right = torch.randn(3, 6, generator=draw(), dtype=F64)
    start = torch.randn(3, 6, generator=draw(1), dtype=F64)
    solved = cholesky_solve(gram, right, start)
    assert torch.equal(solved.value[:, [1, 4]], start[:, [1, 4]]) and solved.unseen == 2
    dense = torch.linalg.solve(gram[kept][:, kept], right[:, kept].T).T
    torch.testing.assert_close(solved.value[:, kept], dense, rtol=1e-9, atol=1e-9)


def test_a_matrix_of_zeros_gives_the_start():
    start = torch.randn(2, 3, generator=draw(), dtype=F64)
    solved = cholesky_solve(torch.zeros(3, 3), torch.zeros(2, 3), start)
    assert torch.equal(solved.value, start) and solved.unseen == 3


def test_a_singular_gram_keeps_what_it_does_not_see_and_says_its_ridge():
    """Fewer rows than columns, stored in fp32: what lies in the null space is noise, and must not be divided by."""
    x = torch.randn(12, 30, generator=draw(), dtype=F64)
    gram = (x.T @ x / 12).float()
    wanted = torch.randn(4, 30, generator=draw(1), dtype=F64)
    start = torch.randn(4, 30, generator=draw(2), dtype=F64)
    solved = cholesky_solve(gram, (wanted @ gram.double()).float(), start)
    assert 1e-5 <= solved.ridge <= 1e-4
    seen = torch.linalg.svd(x, full_matrices=False)[2]
    torch.testing.assert_close(solved.value @ seen.T, wanted @ seen.T, rtol=0, atol=1e-3)
    # the ridge measures distance by each input's own size, so it is in those units that the rest stays
    unseen = torch.linalg.svd(x * gram.diagonal().double().rsqrt())[2][12:]
    moved = (solved.value - start) * gram.diagonal().double().sqrt()
    torch.testing.assert_close(moved @ unseen.T, torch.zeros(4, 18, dtype=F64), rtol=0, atol=0.03)


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match="positive semi-definite"):
        cholesky_solve(torch.tensor([[1.0, 2], [2, 1]]), torch.ones(1, 2), torch.ones(1, 2))


def test_conjugate_gradients_of_regmean_by_hand():
    operator, right, average = KroneckerSum([G1, G2], None), W1 @ G1 + W2 @ G2, (W1 + W2) / 2
    one = solve_kronecker_sum(operator, right, average, preconditioner="none", iterations=1)
    expected = torch.tensor([[2.441683, 0.705545], [0.720841, 0.294455]], dtype=F64)
    torch.testing.assert_close(one.value, expected, rtol=0, atol=1e-6)
    assert not one.converged
    whole = solve_kronecker_sum(operator, right, average, preconditioner="none", tolerance=1e-12)
    assert whole.residuals == pytest.approx((1.462494, 0.416910, 0), abs=1e-6) and whole.converged
    zero = solve_kronecker_sum(operator, right, 0 * average, preconditioner="none", tolerance=1e-12)
    assert zero.residuals == pytest.approx((7.416198, 1.281967, 0), abs=1e-6)


def test_conjugate_gradients_of_kfac_by_hand():
    operator, right = KroneckerSum([G1, G2], [O1, O2]), right_side([G1, G2], [O1, O2], [W1, W2])
    solved = solve_kronecker_sum(operator, right, (W1 + W2) / 2, preconditioner="none", tolerance=1e-12)
    assert solved.residuals == pytest.approx((1.073233, 0.464159, 0.163401, 0.038266, 0), abs=1e-6)
    expected = torch.tensor([[2.705587, 0.594751], [0.173427, 0.744800]], dtype=F64)
    torch.testing.assert_close(solved.value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_kfac_is_the_dense_solution(preconditioner, tasks):
    inputs, outputs, weights = family(9, 13, tasks)
    solved = solve_kronecker_sum(
        KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights), sum(weights) / tasks,
        preconditioner=preconditioner, tolerance=1e-11, iterations=600,
    )  # fmt: skip
    assert solved.converged
    torch.testing.assert_close(solved.value, dense_solution(inputs, outputs, weights), rtol=1e-6, atol=1e-6)


def test_two_tasks_of_kfac_by_simultaneous_diagonalization():
    inputs, outputs, weights = family(24, 31, 2)
    exact = simultaneous_solution(inputs, outputs, weights)
    solved = solve_kronecker_sum(
        KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights), sum(weights) / 2,
        tolerance=1e-11, iterations=500,
    )  # fmt: skip
    torch.testing.assert_close(solved.value, exact, rtol=1e-6, atol=1e-6)
    by_hand = simultaneous_solution([G1, G2], [O1, O2], [W1, W2])
    torch.testing.assert_close(by_hand, dense_solution([G1, G2], [O1, O2], [W1, W2]), rtol=1e-12, atol=1e-12)


def test_one_basis_for_all_tasks_needs_next_to_no_iterations():
    """Grams that commute are diagonal in the sums' bases, so the preconditioner is the inverse."""
    p = torch.linalg.qr(torch.randn(20, 20, generator=draw(), dtype=F64))[0]
    q = torch.linalg.qr(torch.randn(15, 15, generator=draw(1), dtype=F64))[0]
    inputs = [p @ torch.rand(20, generator=draw(t), dtype=F64).diag() @ p.T for t in range(3)]
    outputs = [q @ torch.rand(15, generator=draw(9 + t), dtype=F64).diag() @ q.T for t in range(3)]
    weights = family(15, 20, 3)[2]
    right, start = right_side(inputs, outputs, weights), sum(weights) / 3
    counts = {
        name: solve_kronecker_sum(
            KroneckerSum(inputs, outputs), right, start, preconditioner=name, iterations=200
        ).iterations
        for name in ("eigen", "none")
    }
    assert counts["eigen"] <= 2 < 10 < counts["none"]


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_one_factor_common_to_all_changes_nothing(preconditioner, factor):
    inputs, outputs, weights = family(6, 8, 3)
    start, values = sum(weights) / 3, []
    for scale in (1.0, factor):
        scaled = [o * scale for o in outputs]
        operator, right = KroneckerSum(inputs, scaled), right_side(inputs, scaled, weights)
        values.append(solve_kronecker_sum(operator, right, start, preconditioner=preconditioner).value)
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-8)


def test_the_error_falls_in_the_operator_s_norm_with_every_iteration():
    inputs, outputs, weights = family(7, 9, 3)
    operator, right = KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights)
    exact, errors = dense_solution(inputs, outputs, weights), []
    for iterations in range(1, 12):
        value = solve_kronecker_sum(operator, right, sum(weights) / 3, iterations=iterations, tolerance=0.0).value
        errors.append(((value - exact) * operator(value - exact)).sum().item())
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_what_no_task_sees_stays_at_the_start(preconditioner):
    inputs, outputs, weights = family(6, 8, 2)
    for g in inputs:
        g[5], g[:, 5] = 0, 0
    start = torch.randn(6, 8, generator=draw(3), dtype=F64)
    operator, right = KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights)
    solved = solve_kronecker_sum(operator, right, start, preconditioner=preconditioner, iterations=300)
    torch.testing.assert_close(solved.value[:, 5], start[:, 5], rtol=0, atol=1e-12)
    assert solved.converged and (solved.value[:, :5] - start[:, :5]).abs().max() > 0.1


def test_nothing_to_match_gives_the_start():
    start, zero = torch.ones(3, 3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    for preconditioner in PRECONDITIONERS:
        solved = solve_kronecker_sum(KroneckerSum([zero], [zero]), zero, start, preconditioner=preconditioner)
        assert torch.equal(solved.value, start) and solved.converged


def test_an_absolute_test_may_end_it_before_it_begins():
    """As the solver of the reference code did: Fisher-sized systems then keep their start."""
    matrix, right, start = 1e-6 * G1, 1e-6 * W2, torch.zeros(2, 2, dtype=F64)
    solved = conjugate_gradients(lambda x: x @ matrix, right, start, absolute_first=1e-5)
    assert torch.equal(solved.value, start) and solved.iterations == 0 and solved.converged
    assert conjugate_gradients(lambda x: x @ matrix, right, start).iterations == 2


def test_fp32_reaches_the_tolerance_that_it_reports():
    """The residual that is reported is that of the value that is returned, computed anew in fp64."""
    inputs, outputs, weights = family(60, 80, 4)
    low = [[m.float() for m in part] for part in (inputs, outputs, weights)]
    right = right_side(*low)
    solved = solve_kronecker_sum(KroneckerSum(*low[:2]), right, sum(low[2]) / 4, iterations=300)
    wide = [[m.double() for m in part] for part in low]
    residual = right_side(*wide) - sum(o @ solved.value.double() @ g for g, o in zip(wide[0], wide[1], strict=True))
    assert solved.converged and residual.norm() <= 1.1e-5 * right_side(*wide).norm()
    assert solved.residuals[-1] == pytest.approx(residual.norm().item(), rel=0.1)


def layer_like(out: int, width: int, tasks: int):
    """Grams whose spectra fall by 1e8, as those of layers do, in bases that tasks share only in part."""

    def gram(n: int, seed: int) -> Tensor:
        turned = torch.linalg.qr(torch.eye(n, dtype=F64) + 0.02 * torch.randn(n, n, generator=draw(seed), dtype=F64))[0]
        return turned @ torch.logspace(0, -8, n, dtype=F64).diag() @ turned.T

    weights = [torch.randn(out, width, generator=draw(t), dtype=F64) for t in range(tasks)]
    return [gram(width, 40 + t) for t in range(tasks)], [gram(out, 60 + t) for t in range(tasks)], weights


@pytest.mark.parametrize("tolerance", [1e-2, 2e-3])
def test_a_loose_tolerance_moves_no_more_than_it_must(tolerance):
    """The residual is what was asked for, and the way from the start no longer than that of plain iterations."""
    inputs, outputs, weights = layer_like(96, 128, 3)
    operator, right = KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights)
    start, exact = sum(weights) / 3, right_side(inputs, outputs, weights).norm()
    solved = solve_kronecker_sum(operator, right, start, tolerance=tolerance, iterations=500)
    plain = solve_kronecker_sum(operator, right, start, preconditioner="none", tolerance=tolerance, iterations=1000)
    residual = right - sum(o @ solved.value @ g for o, g in zip(outputs, inputs, strict=True))
    assert solved.converged and plain.converged
    assert residual.norm() <= tolerance * exact
    assert solved.residuals[-1] == pytest.approx(residual.norm().item(), rel=1e-6)
    assert solved.iterations < plain.iterations / 2
    assert (solved.value - start).norm() < 1.1 * (plain.value - start).norm()


def test_more_columns_follow_where_the_first_leave_too_much():
    """Flat spectra in bases of their own: a residual along one pair of directions moves all others."""
    inputs, outputs, weights = [], [], family(96, 128, 2)[2]
    for t in range(2):
        for side, found in ((128, inputs), (96, outputs)):
            turned = torch.linalg.qr(torch.randn(side, side, generator=draw(side + t), dtype=F64))[0]
            found.append(turned @ torch.linspace(1, 0.2, side, dtype=F64).diag() @ turned.T)
    operator, start = KroneckerSum(inputs, outputs), weights[0]
    p, q = operator.eigenbases()
    right = operator(start) + operator(start).norm() * q[:, :1] @ p[:, :1].T
    seen = []
    within = KroneckerSum.within
    try:
        KroneckerSum.within = lambda self, p, q: seen.append((q.shape[1], p.shape[1])) or within(self, p, q)
        solved = solve_kronecker_sum(operator, right, start, tolerance=1e-9, iterations=300)
    finally:
        KroneckerSum.within = within
    assert seen[0] == (32, 32) and seen[-1] == (96, 128) and seen == sorted(set(seen))
    residual = right - sum(o @ solved.value @ g for o, g in zip(outputs, inputs, strict=True))
    assert solved.converged and residual.norm() <= 1e-9 * right.norm()


def test_iterations_end_where_they_are_told_to():
    inputs, outputs, weights = layer_like(96, 128, 3)
    operator, right = KroneckerSum(inputs, outputs), right_side(inputs, outputs, weights)
    start = sum(weights) / 3
    for most in (1, 2, 5):
        solved = solve_kronecker_sum(operator, right, start, tolerance=1e-9, iterations=most)
        assert solved.iterations == most and not solved.converged
        assert solved.residuals[-1] == pytest.approx((right - operator(solved.value)).norm().item(), rel=1e-6)


def test_the_same_system_has_the_same_bits():
    inputs, outputs, weights = [[m.float() for m in part] for part in layer_like(96, 128, 3)]
    right = right_side(inputs, outputs, weights)
    found = [
        solve_kronecker_sum(KroneckerSum(inputs, outputs), right, sum(weights) / 3, tolerance=1e-3).value
        for _ in range(2)
    ]
    assert torch.equal(*found)


def test_an_unknown_preconditioner_is_refused():
    with pytest.raises(ValueError, match="eigen, diagonal, none"):
        solve_kronecker_sum(KroneckerSum([G1], None), W1, W1, preconditioner="ilu")
