"""`peta-fast adapter merge, apply, extract, export`: words in, exit codes and files out."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_files import config_of, exact_deltas, in_plain_peft, largest_difference, save_base, save_peft, stored
from safetensors.torch import load_file
from small_models import linearized, tokens, transformer

import peta_fast as pf
from peta_fast.cli import main

pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")


@pytest.fixture
def pair(tmp_path):
    return [save_peft(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["adapter", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_merge_reports_what_was_kept(pair, tmp_path, capsys):
    code, out, _ = run(
        capsys, "merge", *pair, "--method", "svd", "--rank", "4", "--weights", "0.4,0.3", "--out", tmp_path / "o"
    )
    assert code == 0 and "energy kept" in out and "svd: 4 modules into" in out
    total = {n: 0.4 * d + 0.3 * exact_deltas(pair[1])[n] for n, d in exact_deltas(pair[0]).items()}
    for name, delta in exact_deltas(tmp_path / "o").items():
        U, S, Vh = torch.linalg.svd(total[name])
        torch.testing.assert_close(delta, U[:, :4] * S[:4] @ Vh[:4], rtol=0, atol=1e-6)


def test_merge_in_json_with_settings_of_the_method(pair, tmp_path, capsys):
    words = ("--method", "ties", "--density", "0.5", "--set", "lambda=0.5", "--json", "--out", tmp_path / "o")
    code, out, _ = run(capsys, "merge", *pair, *words)
    found = json.loads(out)
    assert code == 0 and found["method"] == "ties" and len(found["modules"]) == 4 and 0 < found["relative_error"] < 1
    pf.merge_adapters(pair, tmp_path / "p", method="ties", density=0.5, scaling=0.5)
    assert all(torch.equal(t, stored(tmp_path / "p")[k]) for k, t in stored(tmp_path / "o").items())


def test_merge_takes_a_recipe(pair, tmp_path, capsys):
    (tmp_path / "r.yml").write_text(
        f"method: cat\nadapters:\n  - adapter: {pair[0]}\n    parameters: {{weight: [0, 1]}}\n  - {pair[1]}\n"
    )
    assert run(capsys, "merge", tmp_path / "r.yml", "--out", tmp_path / "o")[0] == 0
    assert config_of(tmp_path / "o")["r"] == 6


def test_linear_warns_of_its_cross_terms(pair, tmp_path, capsys):
    code, _, err = run(capsys, "merge", *pair, "--method", "linear", "--out", tmp_path / "o")
    assert code == 0 and "cross terms" in err


def test_apply_writes_a_model_or_its_plan(pair, tmp_path, capsys):
    base = save_base(tmp_path / "base")
    code, out, _ = run(capsys, "apply", base, *pair, "--out", tmp_path / "o", "--weights", "1,0.5", "--dry-run")
    assert code == 0 and not (tmp_path / "o").exists() and "layers.0.q_proj.weight" in out
    code, out, _ = run(
        capsys, "apply", base, *pair, "--out", tmp_path / "o", "--weights", "1,0.5", "-q", "--dtype", "bfloat16"
    )
    assert code == 0 and "merged 19 tensors into" in out
    found = load_file(tmp_path / "o" / "model.safetensors")
    name = "layers.0.q_proj"
    exact = (
        transformer(torch.float32).state_dict()[f"{name}.weight"].double()
        + exact_deltas(pair[0])[name]
        + 0.5 * exact_deltas(pair[1])[name]
    )
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert (found[f"{name}.weight"].double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_extract_and_export(pair, tmp_path, capsys):
    base = save_base(tmp_path / "base")
    pf.apply_adapters(base, pair[:1], tmp_path / "tuned")
    code, out, _ = run(
        capsys, "extract", tmp_path / "tuned", base, "--rank", "3", "--targets", "q_proj", "--out", tmp_path / "o"
    )
    assert code == 0 and "extract: " in out and config_of(tmp_path / "o")["target_modules"] == ["q_proj"]
    model = linearized("gaussian", torch.float32)
    pf.save_adapter(model, tmp_path / "lin")
    code, _, _ = run(capsys, "export", tmp_path / "lin", "--out", tmp_path / "plain")
    assert code == 0
    assert largest_difference(in_plain_peft(tmp_path / "plain")(tokens()), model(tokens())) < 2e-6


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["merge", "A", "B"], 2, "--out: is missing"),
        (["merge", "A", "B", "--out", "o", "--weights", "1;2"], 2, "expected numbers with commas"),
        (["merge", "A", "B", "--out", "o", "--set", "lambda"], 2, "expected KEY=VALUE"),
        (["merge", "A", "B", "--out", "o", "--method", "tie"], 2, "did you mean 'ties'"),
        (["merge", "A", "B", "--out", "o", "--rank", "0"], 2, "integer of at least 1, got 0"),
        (["merge", "A", "missing", "--out", "o"], 3, "found neither"),
        (["apply", "base", "base", "--out", "o"], 3, "found no adapter_config.json"),
        (["export", "A", "--out", "o"], 3, "found no linearization.safetensors"),
        (["merge", "A", "other", "--out", "o"], 4, "different bases"),
        (["merge", "A", "B", "--out", "A"], 5, "lies in, or holds, the input"),
    ],
)
def test_exit_codes_and_messages(words, code, message, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_base(tmp_path / "base")
    save_peft(tmp_path / "other", base="another")
    paths = {"A": str(pair[0]), "B": str(pair[1])}
    got, _, err = run(capsys, *[paths.get(word, word) for word in words])
    assert got == code and message in err and not (tmp_path / "o").exists()


def test_applying_needs_no_torch(pair, tmp_path):
    from interpreter import run_code

    base = save_base(tmp_path / "base")
    words = ["adapter", "apply", str(base), str(pair[0]), "--out", str(tmp_path / "o"), "-q"]
    ran = run_code(f"import sys; from peta_fast.cli import main; print(main({words!r}), 'torch' in sys.modules)")
    assert ran.stdout.strip().endswith("0 False"), ran.stderr
