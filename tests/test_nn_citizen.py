"""Linearized layers among the rest of PyTorch: compiling, transforms, autocast, checkpointing, several processes."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path

import pytest
import torch
from interpreter import run_code
from small_models import linearized, stepped, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import peta_fast as pf
from peta_fast.errors import CompatibilityError


def layer(init="gaussian", dtype=torch.float64, **options) -> pf.LinearizedLoRALinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the base weight; `seed` is the adapter's
        made = pf.LinearizedLoRALinear(6, 4, r=2, alpha=4, init=init, seed=0, dtype=dtype, **options)
    return stepped(made)


def inputs(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def step_gradients(made: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in made.parameters() if p.requires_grad]


def same_gradients(ours: nn.Module, other: nn.Module, **tolerance) -> None:
    for gradient, expected in zip(step_gradients(ours), step_gradients(other), strict=True):
        torch.testing.assert_close(gradient, expected, **tolerance)


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_the_layer_compiles_into_one_graph(init):
    eager, made, x = layer(init), layer(init), inputs(3)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    eager(x).sin().sum().backward()
    compiled(x).sin().sum().backward()
    torch.testing.assert_close(compiled(x), eager(x))
    same_gradients(made, eager)


def test_a_model_with_dropout_compiles_into_one_graph():
    model = linearized("lora", torch.float32, dropout=0.2).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens()).sum().backward()
    assert all(g.any() for g in step_gradients(model))


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_jvp_grad_and_vmap_of_torch_func_go_through(init):
    made, x = layer(init), inputs(3)
    steps = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}
    along = {
        n: torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(7)) for n, p in steps.items()
    }

    def function(steps, x):
        return torch.func.functional_call(made, steps, (x,))

    y, tangent = torch.func.jvp(lambda s: function(s, x), (steps,), (along,))
    moved = function({n: steps[n] + along[n] for n in steps}, x)
    torch.testing.assert_close(y + tangent, moved, rtol=1e-10, atol=1e-12)  # the layer is linear in its steps
    gradients = torch.func.grad(lambda s: function(s, x).sin().sum())(steps)
    made(x).sin().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(made.named_parameters())[name].grad)
    torch.testing.assert_close(torch.func.vmap(lambda row: function(steps, row))(x), made(x))


def test_under_autocast_the_product_runs_in_bf16_and_gradients_stay_fp32():
    made, x = layer(dtype=torch.float32), inputs(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == torch.bfloat16 and {g.dtype for g in step_gradients(made)} == {torch.float32}
    exact = copy.deepcopy(made).double()
    exact.zero_grad()
    exact(inputs(64)).square().mean().backward()
    for gradient, expected in zip(step_gradients(made), step_gradients(exact), strict=True):
        assert (gradient - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_replays_the_same_dropout(dropout):
    plain, repeated = layer(dropout=dropout), layer(dropout=dropout)
    for made, run in ((plain, lambda m, x: m(x)), (repeated, lambda m, x: checkpoint(m, x, use_reentrant=False))):
        torch.manual_seed(0)
        run(made.train(), inputs(50)).sin().sum().backward()
    same_gradients(repeated, plain)


def test_reentrant_checkpointing_that_would_lose_the_gradients_is_an_error():
    made = layer().train()
    with pytest.raises(
        CompatibilityError, match="runs inside reentrant checkpointing whose inputs require no gradient"
    ):
        checkpoint(made, inputs(3), use_reentrant=True)


def test_reentrant_checkpointing_of_inputs_with_gradients_works():
    plain, repeated, x = layer(), layer(), inputs(3).requires_grad_()
    plain(x).sin().sum().backward()
    checkpoint(lambda x: repeated(x * 1), x, use_reentrant=True).sin().sum().backward()
    same_gradients(repeated, plain)


def test_without_gradients_a_layer_in_training_mode_just_runs():
    made = layer().train()
    with torch.no_grad():
        assert torch.equal(made(inputs(3)), made.eval()(inputs(3)))


def test_a_training_step_lowers_the_loss_and_touches_the_steps_alone():
    model = linearized("gaussian", torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens()), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {n.rpartition(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"delta_A", "delta_B"}


# two processes, over gloo: each sees half of the batch, and the gradients must be those of the whole one

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path.insert(0, {here!r})
from small_models import linearized, tokens
from torch.nn.functional import cross_entropy

LABELS = torch.tensor([0, 1, 2, 0])

def trained(model, rows, steps=3, scale=1.0):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(tokens()[rows]), LABELS[rows]).backward()
        optimizer.step()

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{{port}}", rank=rank, world_size=2)
    alone = linearized("gaussian").train()
    trained(alone, slice(None))
    model = linearized("gaussian"{options}).train()
    {wrap}
    trained(wrapped, slice(2 * rank, 2 * rank + 2))
    expected = {{n: p for n, p in alone.named_parameters() if p.requires_grad}}
    found = {{n.removeprefix("module."): whole(p) for n, p in wrapped.named_parameters() if p.requires_grad}}
    assert set(found) == set(expected) and len(found) == 8
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    {more}
    if rank == 0:
        print("same")
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
"""
DDP = "wrapped = torch.nn.parallel.DistributedDataParallel(model)"
FSDP2 = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
"""
SHARDED_STATE = """
    import peta_fast
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(wrapped, options=options)
    if rank == 0:
        assert set(state) == set(alone.state_dict())
        torch.testing.assert_close(state["layers.0.q_proj.delta_B"], expected["layers.0.q_proj.delta_B"])
    try:
        peta_fast.save_adapter(wrapped, "never")
    except peta_fast.CompatibilityError as error:
        assert "sharded" in str(error)
    else:
        raise AssertionError("a sharded adapter was saved")
"""


GROUPED = ', groups=[["q_proj", "v_proj"]]'


@pytest.mark.parametrize(
    ("wrap", "more", "options"),
    [(DDP, "", ""), (FSDP2, SHARDED_STATE, ""), (DDP, "", GROUPED), (FSDP2, "", GROUPED)],
    ids=["ddp", "fsdp2", "ddp-grouped", "fsdp2-grouped"],
)
def test_two_processes_train_as_one(wrap, more, options, tmp_path):
    code = TWO_PROCESSES.format(here=str(Path(__file__).parent), wrap=wrap.strip(), more=more.strip(), options=options)
    script = tmp_path / "two_processes.py"
    script.write_text(textwrap.dedent(code))
    ran = run_code(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert ran.stdout.strip() == "same", ran.stderr[-3000:]
