"""Concrete masks on a GPU: the Triton kernels against fp64, and fitting with all tensors on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from concrete_mask_cases import KEY_OF, Case, assert_near, make_case
from fit_cases import batches_of, toy_family

from peta_fast.fit.concrete import concrete_adamerging
from peta_fast.fit.tasks import Task
from peta_fast.ops.concrete_mask import Piece, concrete_merge, dispatch
from peta_fast.ops.concrete_mask.noise import mask_key

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KEY = mask_key(*KEY_OF)


def on_gpu(case: Case) -> Case:
    vectors = tuple(x.cuda() for x in case.task_vectors)
    return Case(
        case.base.cuda(), vectors, case.coefficients.cuda(), case.logits.cuda(), case.g.cuda(), case.temperature
    )


@pytest.mark.parametrize("temperature", [0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size, tasks", [((1,), 1), ((1003,), 3), ((512, 1024), 8)], ids=str)
def test_value_and_gradients_are_accurate(size, tasks, dtype, temperature):
    case = make_case(*size, tasks=tasks, temperature=temperature, dtype=dtype)
    exact, there = case.exact(), on_gpu(case)
    assert dispatch.code_for(Piece(there.task_vectors, logits=there.logits)).__name__.endswith("launch")
    logits, coefficients = there.logits.requires_grad_(), there.coefficients.requires_grad_()
    theta = concrete_merge(there.base, there.task_vectors, coefficients, logits, key=KEY, temperature=temperature)
    theta.backward(there.g)
    assert_near(theta.cpu(), exact.theta, 1e-6 + torch.finfo(dtype).eps / 2)
    assert_near(coefficients.grad.cpu(), exact.g_coefficients, 1e-5)
    assert_near(logits.grad.cpu(), exact.g_logits, 3e-6, exact.terms)


def test_fitting_goes_the_same_way_as_on_the_cpu():
    model, base, tuned = toy_family(2)
    settings = {"base": base, "steps": 3, "learning_rate": 0.1, "inner_learning_rate": 0.05, "coefficient_steps": 3}
    found = []
    for device in ("cpu", "cuda"):
        fitted = concrete_adamerging(copy.deepcopy(model).to(device), tuned, [Task("t", batches_of(4))], **settings)
        found.append(fitted)
    losses = [[p.loss for p in fitted.history] for fitted in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, tensor in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
