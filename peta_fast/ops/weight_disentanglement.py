"""Adaptive weight disentanglement: the common vector whose removal makes task vectors nearly orthogonal.

    L(delta) = 1/(T (T-1)) sum_{i != j} |cos(tau_i - delta, tau_j - delta)| + alpha |delta|,   delta starts at 0

The gradient of L lies in the span of the task vectors, so gradient descent on the N elements of delta is, step by step
and exactly, descent on the T coefficients of delta = sum_t a_t tau_t; all it needs is the task vectors' Gram matrix.
Cost: T^3 a step, whatever N is, where descent on delta itself reads all task vectors in every step.
Source: Xiong et al., 2024, arXiv:2411.18729.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peta_fast.errors import RecipeError


@dataclass(frozen=True)
class Disentanglement:
    """What the descent found.

    coefficients  [T] fp64, delta = sum_t a_t tau_t
    overlap       [iterations + 1] mean |cos| of the pairs, before and after every step
    objective     [iterations + 1] the same + alpha |delta|
    """

    coefficients: np.ndarray
    overlap: np.ndarray
    objective: np.ndarray

    def weights(self, weights) -> np.ndarray:
        """[T, ...] the weights of plain task arithmetic that merge the task vectors without delta.

            sum_t w_t (tau_t - delta) = sum_t (w_t - a_t sum_s w_s) tau_t

        weights  [T, ...], one column a layer where they are layer-wise; a gradient in the new weights goes back to
                 the old ones by `pulled_back`
        """
        weights = np.asarray(weights, np.float64)
        return weights - np.multiply.outer(self.coefficients, weights.sum(0))

    def pulled_back(self, gradient) -> np.ndarray:
        """[T, ...] the gradient in w, from the gradient in `weights(w)`: what learning coefficients needs."""
        gradient = np.asarray(gradient, np.float64)
        return gradient - np.tensordot(self.coefficients, gradient, 1)


def disentangle(gram, *, alpha: float = 0.1, learning_rate: float = 0.01, iterations: int = 300) -> Disentanglement:
    """Gradient descent from delta = 0.

    gram  [T, T] inner products of whole task vectors, T >= 2
    Where cos is 0, or a vector has no length, and at delta = 0, the terms that have no derivative count as flat.
    Raises RecipeError when there are fewer than two task vectors, or the Gram matrix is not finite or not symmetric.
    """
    gram = checked(gram)
    a = np.zeros(len(gram))
    overlaps, objectives = [], []
    for step in range(iterations + 1):
        overlap, gradient = _overlap(gram, a)
        length = np.sqrt(max(a @ gram @ a, 0.0))
        overlaps.append(overlap)
        objectives.append(overlap + alpha * length)
        if step < iterations:
            a = a - learning_rate * (gradient + (alpha / length * a if length else 0.0))
    return Disentanglement(a, np.array(overlaps), np.array(objectives))


def checked(gram) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) < 2:
        raise RecipeError("awd", f"expected the Gram matrix of two task vectors or more, got shape {list(gram.shape)}")
    if not np.isfinite(gram).all() or not np.array_equal(gram, gram.T):
        raise RecipeError(
            "awd", "expected a finite, symmetric Gram matrix of the task vectors", "Look for NaN in them."
        )
    return gram


def _overlap(gram: np.ndarray, a: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean |cos| of the pairs of tau_i - delta, and its gradient in delta, as coefficients of the task vectors."""
    tasks = len(a)
    v = np.eye(tasks) - a  # row i: tau_i - delta
    inner = v @ gram @ v.T
    norms = np.sqrt(np.maximum(np.diagonal(inner), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros(tasks), where=norms > 0)
    cosines = inner * np.outer(inverse, inverse)
    np.fill_diagonal(cosines, 0.0)
    signs = np.sign(cosines)
    # of every v_i in  sum_{i != j} -sgn(c) [v_i / (n_i n_j) - c v_i / n_i^2]
    pull = -inverse * (signs @ inverse) + (signs * cosines).sum(1) * inverse**2
    pairs = tasks * (tasks - 1)
    return float(np.abs(cosines).sum() / pairs), 2 / pairs * (pull @ v)
