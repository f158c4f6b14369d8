"""Adapters: merging three of rank 16 without a dense model, TIES on their true changes, and applying them to a base.

svd          reads 3 (in + out) 16 numbers, two QRs of [side, 48], an SVD of 48 x 48; the floor is reading the factors
llama_7b     that for 224 modules, split into reading, QR, SVD and writing (with fsync)
ties         forms 3 in out entries twice (thresholds, merge), reads the result 5 times in the sketch
apply        base read, written and fsynced: 4 bytes a parameter in bf16, 96 flops a parameter

    python benchmarks/bench_adapters.py --base FOLDER --work FOLDER [--results FOLDER]

References: PEFT's add_weighted_adapter of type svd and ties_svd on one Linear, in the same run; for `apply`, the
fastest way found to read and write the base's files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from adapter_files import LLAMA_7B, llama_shapes, make_adapter
from floors import FileFloor
from processes import run_timed
from rows import Row, best_and_median, write_json
from table import markdown

import peta_fast as pf
from peta_fast.adapters.inputs import AdapterSet, open_adapters
from peta_fast.adapters.results import Stored, write_lora
from peta_fast.ops.low_rank import LowRank, distance, stacked, truncated

WEIGHTS = [0.4, 0.3, 0.3]
RANK = 16
DENSITY = 0.2
PARTS = ("layer", "apply", "7b")


def timed(work, rounds: int) -> tuple[list[float], object]:
    times, result = [], None
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return times, result


def peft_model(folders: list[Path], side: int):
    """A single Linear with the adapters loaded by PEFT."""
    from peft import PeftModel

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(side, side, bias=False)

    model = PeftModel.from_pretrained(Layer(), str(folders[0]), adapter_name="0")
    for place, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(place))
    return model


def peft_delta(model, kind: str, name: str, **options) -> torch.Tensor:
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, name, combination_type=kind, svd_rank=RANK, **options)
    return model.base_model.model.q_proj.get_delta_weight(name).detach()


def one_layer(work: Path, side: int, rounds: int, references: int) -> list[Row]:
    """svd and ties of three adapters of one layer: in memory, from PEFT's tensors to the factors of the result."""
    folders = [make_adapter(work / f"{side}-{i}", {"q_proj": (side, side)}, RANK, i) for i in range(3)]
    group = AdapterSet(open_adapters([str(f) for f in folders]))
    changes = group.changes("q_proj")
    weights = [w * c.module.scaling for w, c in zip(WEIGHTS, changes, strict=True)]

    def svd():
        return truncated(stacked([c.factors for c in changes], weights), RANK)

    svd()
    ours, found = timed(svd, rounds)
    floor, _ = timed(lambda: [c.factors.B.sum() + c.factors.A.sum() for c in changes], rounds)
    model = peft_model(folders, side)
    theirs, delta = timed_once_each(lambda i: peft_delta(model, "svd", f"svd{i}"), references)
    exact = sum(w * c.factors.B.double() @ c.factors.A.double() for w, c in zip(weights, changes, strict=True))
    agree = ((found.change.dense() - delta).norm() / delta.norm()).item()
    shape = f"three adapters of rank {RANK}, {side} x {side}, fp32, to rank {RANK}"
    measured = (found.change.dense().double() - exact).norm().item()
    rows = [Row(
        f"adapter_svd[{side}]", shape, min(ours), min(theirs), min(floor), abs(measured - found.error) / found.norm,
        "PEFT svd", "reading the factors", "of the norm, stated error against the dense one", goal="500 x PEFT",
        details={"ours": best_and_median(ours), "reference": best_and_median(theirs), "difference_to_peft": agree,
                 "energy": found.energy},
    )]  # fmt: skip
    return rows + ties_of_one_layer(work, folders, model, side, rounds, references)


def timed_once_each(work, rounds: int):
    times, result = [], None
    for i in range(rounds):
        began = time.perf_counter()
        result = work(i)
        times.append(time.perf_counter() - began)
    return times, result


def ties_of_one_layer(work: Path, folders, model, side: int, rounds: int, references: int) -> list[Row]:
    out = work / "ties-out"

    def ties():
        shutil.rmtree(out, ignore_errors=True)
        return pf.merge_adapters(
            folders, out, method="ties", density=DENSITY, weights=WEIGHTS, compat="peft", rank=RANK
        )

    ties()
    ours, report = timed(ties, rounds)
    theirs, delta = timed_once_each(lambda i: peft_delta(model, "ties_svd", f"ties{i}", density=DENSITY), references)
    from safetensors.torch import load_file

    tensors = load_file(out / "adapter_model.safetensors")
    mine = LowRank(tensors["base_model.model.q_proj.lora_B.weight"], tensors["base_model.model.q_proj.lora_A.weight"])
    theirs_error = (peft_ties(folders) - delta).norm().item()
    ours_error = (peft_ties(folders) - mine.dense()).norm().item()
    (module,) = report.modules
    return [
        Row(
            f"adapter_ties[{side}]",
            f"three adapters of rank {RANK}, {side} x {side}, TIES {DENSITY} on B A, to rank {RANK}, files to files",
            min(ours),
            min(theirs),
            None,
            abs(ours_error - module.error) / module.norm,
            "PEFT ties_svd, in memory",
            "",
            "of the norm, stated error against the dense one",
            goal="20 x PEFT",
            details={
                "ours": best_and_median(ours),
                "reference": best_and_median(theirs),
                "error_of_ours": ours_error / module.norm,
                "error_of_peft": theirs_error / module.norm,
            },
        )
    ]


def peft_ties(folders) -> torch.Tensor:
    """PEFT's TIES of the dense changes, before it is factored."""
    from peft.utils.merge_utils import ties

    group = AdapterSet(open_adapters([str(f) for f in folders]))
    return ties([c.scaled().dense() for c in group.changes("q_proj")], torch.tensor(WEIGHTS), DENSITY)


def llama_7b(work: Path, rounds: int) -> list[Row]:
    """All 224 modules, files to files, and the same with its parts timed one by one."""
    folders = [make_adapter(work / f"7b-{i}", LLAMA_7B, RANK, i) for i in range(3)]
    out = work / "7b-out"

    def whole():
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        report = pf.merge_adapters(folders, out, method="svd", rank=RANK, weights=WEIGHTS)
        return time.perf_counter() - began, report

    runs = [whole() for _ in range(rounds)]
    seconds, report = min(runs, key=lambda run: run[0])
    parts = parts_of_svd(folders, work / "7b-parts")
    error = check_one(folders, out, report, "model.layers.7.mlp.down_proj")
    return [
        Row(
            "adapter_svd[llama-7b]",
            f"three adapters of rank {RANK} on 224 modules of a Llama-7B, fp32, to rank {RANK}, files",
            seconds,
            None,
            parts["reading"] + parts["writing"],
            error,
            "",
            "reading and writing the adapters",
            "of the norm, stated error against the dense one",
            details={"parts": parts, "rounds": [s for s, _ in runs]},
        )
    ]


def parts_of_svd(folders: list[Path], out: Path) -> dict[str, float]:
    """Seconds of reading, QR, SVD of the core, putting together, and writing with fsync."""
    spent: dict[str, float] = defaultdict(float)

    def clocked(what: str, work):
        began = time.perf_counter()
        result = work()
        spent[what] += time.perf_counter() - began
        return result

    group = clocked("reading", lambda: AdapterSet(open_adapters([str(f) for f in folders])))
    modules = {}
    for name in group.modules:
        changes = clocked("reading", lambda name=name: group.changes(name))
        weights = [w * c.module.scaling for w, c in zip(WEIGHTS, changes, strict=True)]
        total = clocked(
            "putting together", lambda c=changes, w=weights: stacked([x.factors for x in c], w).to(torch.float64)
        )
        Q, R_B = clocked("QR", lambda t=total: torch.linalg.qr(t.B))
        P, R_A = clocked("QR", lambda t=total: torch.linalg.qr(t.A.T))
        U, S, Vh = clocked("SVD", lambda a=R_B, b=R_A: torch.linalg.svd(a @ b.T))
        root = S[:RANK].sqrt()
        B = clocked("putting together", lambda q=Q, u=U, r=root: (q @ u[:, :RANK] * r).float())
        A = clocked("putting together", lambda p=P, v=Vh, r=root: ((p @ v[:RANK].T) * r).T.float().contiguous())
        modules[name] = Stored(LowRank(B, A))
    clocked("writing", lambda: write_lora(out, modules, {}, {"peft_type": "LORA"}, "a benchmark\n"))
    return dict(spent)


def check_one(folders, out: Path, report, name: str) -> float:
    """Of one module, the difference of the stated error and that of the dense matrices, over the norm."""
    group = AdapterSet(open_adapters([str(f) for f in (*folders, out)]))
    *terms, merged = group.changes(name)
    exact = stacked([c.factors.to(torch.float64) for c in terms],
                    [w * c.module.scaling for w, c in zip(WEIGHTS, terms, strict=True)])  # fmt: skip
    module = next(m for m in report.modules if m.name == name)
    assert abs(distance(merged.scaled(), exact) - module.error) < 1e-5 * module.norm
    return abs((merged.scaled().dense().double() - exact.dense()).norm().item() - module.error) / module.norm


def apply(base: Path, work: Path, rounds: int) -> list[Row]:
    config = json.loads((base / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    shapes = llama_shapes(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
                          head * config["num_key_value_heads"])  # fmt: skip
    folders = [make_adapter(work / f"base-{i}", shapes, RANK, i) for i in range(3)]
    files, out = sorted(base.glob("*.safetensors")), work / "applied"
    size = sum(file.stat().st_size for file in files)
    floor = FileFloor(files, size, work / "scratch")
    words = [
        sys.executable,
        "-m",
        "peta_fast",
        "adapter",
        "apply",
        base,
        *folders,
        "--out",
        out,
        "--weights",
        "0.4,0.3,0.3",
        "-q",
    ]
    times, inside = [], []
    for _ in range(rounds):
        floor.measure()
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        times.append(run_timed(words, cwd=work).seconds)
        shutil.rmtree(out)
        os.sync()
        began = time.perf_counter()
        pf.apply_adapters(base, folders, out, weights=WEIGHTS)
        inside.append(time.perf_counter() - began)
    error = applied_error(base, folders, out)
    shutil.rmtree(out)
    peak = run_timed(words, cwd=work, sample_every=0.005).peak_memory
    parameters = f"{size / 2e6:.3g}e6 parameters in bf16, three adapters of rank {RANK} on every matrix of the layers"
    unit = "roundings to bf16, over one tensor of every shape"
    rows = [
        Row(
            "adapter_apply",
            parameters,
            min(times),
            None,
            floor.seconds,
            error,
            "",
            "reading and writing the base",
            unit,
            goal="1.5 x the floor",
            nbytes=2 * size,
            details={
                "processes": best_and_median(times),
                "in_a_running_python": best_and_median(inside),
                **floor.details(),
            },
        ),
        Row("adapter_apply_memory", parameters, peak, unit="bytes", goal="1 GiB"),
    ]
    shutil.rmtree(out)
    return rows


def applied_error(base: Path, folders, out: Path) -> float:
    """The largest |out - exact| / (2^-7 max(|exact|, |base|)) over tensors of every shape; one rounding gives 0.5."""
    from safetensors import safe_open

    group = AdapterSet(open_adapters([str(f) for f in folders]))
    worst = 0.0
    for name in list(group.modules)[:7]:
        tensors = []
        for folder in (base, out):
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as stored:
                    if f"{name}.weight" in stored.keys():  # noqa: SIM118
                        tensors.append(stored.get_tensor(f"{name}.weight"))
        exact = tensors[0].double()
        for w, c in zip(WEIGHTS, group.changes(name), strict=True):
            exact += w * c.module.scaling * c.factors.B.double() @ c.factors.A.double()
        step = 2.0**-7 * torch.maximum(exact.abs(), tensors[0].double().abs()).clamp(min=1e-30)
        worst = max(worst, ((tensors[1].double() - exact).abs() / step).max().item())
    return worst


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=Path, required=True, help="a Llama-shaped checkpoint, as make_llama_family.py makes them"
    )
    parser.add_argument("--work", type=Path, required=True, help="takes adapters and outputs")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    parts = {
        "layer": lambda: one_layer(given.work, 4096, 4 * given.rounds, 1),
        "apply": lambda: apply(given.base, given.work, given.rounds),
        "7b": lambda: llama_7b(given.work, min(given.rounds, 3)),
    }
    rows: list[Row] = []
    name = "adapters" if len(given.parts) == len(parts) else f"adapters_{'_'.join(given.parts)}"
    for part in given.parts:
        rows += parts[part]()
        write_json(rows, given.results / f"{name}.json")
        (given.results / f"{name}.md").write_text(markdown([row.to_json() for row in rows]), encoding="utf-8")
    print((given.results / f"{name}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
