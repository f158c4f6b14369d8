"""Statistics of models and the linear systems of MaTS, in fp32 on the CPU.

bench_kfac    sum_t O_t W G_t = b, 1024 x 1024, T = 4, from the average, until |b - A(W)| <= residual |b|. Ours with its
              bases and all; the reference is SciPy's CG over the same operator: the same two stacked products,
              through numpy views of the same memory, 1000 iterations at most (`iterations` says where it stopped, and
              with which residual). Flops: T (2 in^2 out + 2 in out^2) = 17 G a product, of which SciPy needs one an
              iteration. Floor: two products, the residuals before and after. `error`: the residual of our result,
              formed anew in fp64, over the one asked for. `step`: how far the result is from the start, of ours and
              SciPy's, in norms of the longest task vector.
bench_gram    G += X^T X. Flops: m n^2 for the upper triangle. Reference: the whole product, as torch has it.
bench_regmean_pp  blocks of pre-norm MLPs 256 wide, 2 tasks, 4 batches of 64 x 16 tokens: activations carried from
              block to block. Floor: a forward pass over all data. Reference: a pass from the start for each block; the
              result must have the same bits.
bench_fisher  the exact Fisher of 250 examples with 4.3 million weights. Floor: one forward and backward pass.
              Reference: a backward pass for each example, squared and added.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import seconds
from solved_layers import networks, system
from torch.nn.functional import cross_entropy

import peta_fast as pf
from peta_fast.ops.gram import add_gram, pack
from peta_fast.ops.kronecker_sum import KroneckerSum, solve_kronecker_sum

linalg = pytest.importorskip("scipy.sparse.linalg", reason="scipy is not installed: pip install 'peta_fast[demo]'")
MOST_ITERATIONS = 1000
EXAMPLES = 250


class Scipy:
    """The reference's way: a vector of all elements, scipy.sparse.linalg.cg without a preconditioner."""

    def __init__(self, operator: KroneckerSum, right, start, residual: float):
        self.operator, self.right, self.start, self.residual = operator, right, start, residual
        self.iterations = 0

    def __call__(self) -> None:
        shape, self.iterations = self.right.shape, 0

        def apply(vector: np.ndarray) -> np.ndarray:
            return self.operator(torch.from_numpy(vector).view(shape)).numpy().reshape(-1)

        def count(_) -> None:
            self.iterations += 1

        size = self.right.numel()
        matrix = linalg.LinearOperator((size, size), matvec=apply, dtype=np.float32)
        right, start = (m.numpy().reshape(-1) for m in (self.right, self.start))
        found, self.code = linalg.cg(
            matrix, right, start, rtol=self.residual, atol=0.0, maxiter=MOST_ITERATIONS, callback=count
        )
        self.value = torch.from_numpy(found).view(shape)


@pytest.mark.parametrize("residual", [1e-2, 1e-3, 1e-4], ids="residual{:.0e}".format)
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def bench_kfac(measure, layer, residual):
    inputs, outputs, weights = system(layer)
    operator = KroneckerSum(inputs, outputs)
    right = sum(o @ w @ g for o, w, g in zip(outputs, weights, inputs, strict=True))
    start = sum(weights) / len(weights)
    found = {}

    def ours() -> None:
        found["ours"] = solve_kronecker_sum(operator, right, start, tolerance=residual, iterations=MOST_ITERATIONS)

    def products() -> None:
        for _ in range(2):
            operator(start)

    def true_residual(value) -> float:
        wide = [[m.double() for m in part] for part in (inputs, outputs)]
        exact = sum(o @ w.double() @ g for g, o, w in zip(*wide, weights, strict=True))
        return ((exact - sum(o @ value.double() @ g for g, o in zip(*wide, strict=True))).norm() / exact.norm()).item()

    def error() -> float:
        reached = true_residual(scipy.value)
        assert scipy.code or reached < 1.05 * residual
        details.update(scipy=scipy.iterations, scipy_residual=reached, ours=found["ours"].iterations)
        longest = max((w - start).norm() for w in weights)
        steps = {
            n: ((v - start).norm() / longest).item() for n, v in (("ours", found["ours"].value), ("scipy", scipy.value))
        }
        details["step"] = steps
        worst = true_residual(found["ours"].value) / residual
        assert worst < 1.05, f"the residual is {worst} of what was asked for"
        return worst

    ours()
    scipy = Scipy(operator, right, start, residual)
    details: dict = {}
    measure(
        ours,
        floor=lambda: seconds(products),
        floor_name="two products",
        reference=lambda: seconds(scipy),
        reference_name="SciPy's CG",
        error=error,
        error_unit="of the residual",
        shape=f"1024 x 1024, T = 4, {layer} of digits networks, |r| <= {residual:g} |b|, fp32",
        goal="a third of SciPy's time",
        iterations=details,
    )


@pytest.mark.parametrize("side", [384, 1024, 4096])
def bench_gram(measure, side):
    rows = torch.randn(1024, side, generator=torch.Generator().manual_seed(0))
    total, whole = torch.zeros(side, side), torch.zeros(side, side)

    def error() -> float:
        ours, plain = torch.zeros(side, side), rows.double().T @ rows.double()
        add_gram(ours, rows)
        return ((pack(ours) - pack(plain)).abs().max() / plain.abs().max()).item()

    assert error() < 1e-5
    measure(
        lambda: add_gram(total, rows),
        floor=lambda: seconds(lambda: total.sum()),
        floor_name="reading G",
        reference=lambda: seconds(lambda: whole.addmm_(rows.T, rows)),
        reference_name="X^T X",
        error=error,
        error_unit="relative",
        shape=f"1024 rows of {side}, fp32",
    )


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stacked(torch.nn.Module):
    def __init__(self, depth: int, width: int = 256):
        super().__init__()
        self.layers, self.head = torch.nn.ModuleList(Block(width) for _ in range(depth)), torch.nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("depth", [6, 12, 24])
def bench_regmean_pp(measure, depth, monkeypatch):
    from peta_fast.fit import _stacks

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Stacked(depth).eval())
    generator = torch.Generator().manual_seed(0)
    data = [[torch.randn(64, 16, 256, generator=generator) for _ in range(4)] for _ in models]
    found: dict = {}

    def ours() -> None:
        found["ours"] = pf.regmean_pp(models, data)[0]

    def long_way() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(_stacks, "SHORTEST", 99)
            found["long"] = pf.regmean_pp(models, data)[0]

    @torch.no_grad()
    def passes() -> None:
        for model, batches in zip(models, data, strict=True):
            for batch in batches:
                model(batch)

    def error() -> float:
        assert all(torch.equal(found["ours"][n], found["long"][n]) for n in found["ours"])
        return 0.0

    measure(
        ours,
        floor=lambda: seconds(passes),
        floor_name="a pass over the data",
        reference=lambda: seconds(long_way),
        reference_name="a pass from the start for each block",
        error=error,
        error_unit="bits",
        shape=f"{depth} blocks 256 wide, 2 tasks, 4,096 tokens each, fp32",
    )


def bench_fisher(measure):
    models, seen = networks()
    model, x, y = models[0].train(False), seen[0].pixels[:EXAMPLES], seen[0].labels[:EXAMPLES]
    parameters = dict(model.named_parameters())
    found: dict = {}

    def ours() -> None:
        found.update(pf.collect_statistics(model, [(x, y)], kinds=("fisher",)))

    def one_by_one() -> None:
        totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for i in range(EXAMPLES):
            loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            for name, g in zip(totals, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                totals[name].addcmul_(g, g, value=1 / EXAMPLES)
        found["each"] = totals

    def error() -> float:
        worst = max(
            ((found[f"{n}.fisher"] - exact).abs().max() / exact.abs().max()).item()
            for n, exact in found["each"].items()
        )
        assert worst < 1e-4, f"the Fisher is off by {worst}"
        return worst

    measure(
        ours,
        floor=lambda: seconds(lambda: cross_entropy(model(x), y).backward()),
        floor_name="one backward pass",
        reference=lambda: seconds(one_by_one),
        reference_name="one by one",
        error=error,
        error_unit="relative",
        shape=f"{sum(p.numel() for p in parameters.values()):,} weights, {EXAMPLES} examples, fp32",
    )
