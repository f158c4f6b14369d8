"""Adapters into a base, extraction out of a fine-tune, and recipes in which adapters stand among full models."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_files import (
    change_tensors,
    config_of,
    exact_deltas,
    in_plain_peft,
    largest_difference,
    loaded,
    save_base,
    save_peft,
    stored,
)
from references import assert_close_to_reference, merge_with_terms
from safetensors.torch import load_file
from small_models import tokens

import peta_fast as pf
from peta_fast.adapters.apply import apply_recipe
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError
from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe

pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def pair(tmp_path):
    return [save_peft(tmp_path / "a"), save_peft(tmp_path / "b", seed=5, r=5, use_rslora=True)]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def finetuned(base, *deltas) -> dict[str, torch.Tensor]:
    """The base's tensors in fp64 with (weight, {module: delta}) pairs added."""
    state = {n: t.double() for n, t in weights_of(base).items()}
    for weight, changes in deltas:
        for name, delta in changes.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + weight * delta
    return state


def assert_equal_to_rounding(folder, exact, roundings: float = 1.0) -> None:
    """Half a unit in the last place of the output's dtype, and fp32's of what was added up."""
    for name, tensor in weights_of(folder).items():
        allowed = roundings * torch.finfo(tensor.dtype).eps * exact[name].abs().clamp(min=1.0)
        assert ((tensor.double() - exact[name]).abs() <= allowed).all(), name


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_alpha": 5}, {"rank_pattern": {"v_proj": 2}},
                                    {"bias": "lora_only", "modules_to_save": ["classifier"]}], ids=str)  # fmt: skip
def test_an_applied_adapter_computes_what_peft_computes(fields, base, tmp_path):
    adapter = save_peft(tmp_path / "a", **fields)
    pf.apply_adapters(base, [adapter], tmp_path / "out")
    peft, ours = in_plain_peft(adapter), loaded(tmp_path / "out")
    assert largest_difference(ours(tokens()), loaded(base)(tokens())) > 0.05
    assert largest_difference(ours(tokens()), peft(tokens())) < 1e-6
    merged = peft.merge_and_unload().state_dict()
    for name, tensor in weights_of(tmp_path / "out").items():
        assert largest_difference(tensor, merged[name]) < 1e-6
        if "classifier" in name and "modules_to_save" in fields:
            assert torch.equal(tensor, stored(adapter)[f"base_model.model.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_several_adapters_are_added_up_in_fp32_and_rounded_once(dtype, pair, tmp_path):
    base = save_base(tmp_path / "base", dtype=dtype)
    pf.apply_adapters(base, pair, tmp_path / "out", weights=[0.5, -2.0])
    exact = finetuned(base, *zip([0.5, -2.0], map(exact_deltas, pair), strict=True))
    found = weights_of(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {dtype}
    for name, tensor in found.items():
        half_ulp = torch.finfo(dtype).eps / 2 * exact[name].abs()
        assert ((tensor.double() - exact[name]).abs() <= half_ulp + 3e-6).all(), name
    if dtype == torch.bfloat16:  # one rounding: nearest to the fp32 sum, hardly ever another neighbour than fp64's
        rounded = {n: t.to(dtype) for n, t in exact.items()}
        assert sum(int((found[n] != rounded[n]).sum()) for n in found) <= 2


def test_a_weight_may_differ_from_layer_to_layer(base, pair, tmp_path):
    pf.apply_adapters(
        base, pair, tmp_path / "out", weights=[[0.0, 1.0], [{"filter": "q_proj", "value": 2}, {"value": 1}]]
    )
    a, b = map(exact_deltas, pair)
    exact = finetuned(base, (1, {n: d for n, d in a.items() if "layers.1" in n}), (1, b),
                      (1, {n: d for n, d in b.items() if "q_proj" in n}))  # fmt: skip
    assert_equal_to_rounding(tmp_path / "out", exact, 8)


METHODS = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.5, "seed": 7},
    "breadcrumbs": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "ties-authors": {"method": "ties", "density": 0.3, "compat": "ties-authors"},
}


@pytest.mark.parametrize("name", METHODS)
def test_several_adapters_are_merged_by_any_method(name, base, pair, tmp_path):
    keys = {"method": name} | METHODS[name]
    weights = None if name == "ties-authors" else [0.5, 2.0]
    pf.apply_adapters(base, pair, tmp_path / "out", weights=weights, **keys)
    state = weights_of(base)
    models = [formed_deltas(f, state) for f in pair]
    zeros = {n: torch.zeros_like(t) for n, t in state.items()}
    exact = merge_with_terms(zeros, models, weight=weights or 1.0, **keys)
    for tensor_name, tensor in weights_of(tmp_path / "out").items():
        expected = state[tensor_name].double() + exact[tensor_name].value
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=3e-6)


def formed_deltas(folder, state) -> dict[str, torch.Tensor]:
    """An adapter's change of every tensor in fp32, ranks added one by one, each rounded once."""
    import math

    config, tensors = config_of(folder), stored(folder)
    found = {n: torch.zeros_like(t) for n, t in state.items()}
    for key, A in tensors.items():
        if "lora_A" not in key:
            continue
        B, r = tensors[key.replace("lora_A", "lora_B")], A.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        left, total = (scaling * B.double()).float(), torch.zeros(B.shape[0], A.shape[1])
        for k in range(r):
            total = (total.double() + left[:, k : k + 1].double() * A[k].double()).float()
        found[key.removeprefix("base_model.model.").replace("lora_A.", "")] = total
    return found


# Recipes


def test_recipes_take_adapters_among_full_models_in_one_pass(base, pair, tmp_path):
    full = save_base(tmp_path / "full")
    state = {
        n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
        for n, t in weights_of(base).items()
    }
    from safetensors.torch import save_file

    save_file(state, full / "model.safetensors")
    recipe = {
        "method": "task_arithmetic", "base_model": str(base),
        "models": [{"model": f"{base}+{pair[0]}", "parameters": {"weight": 0.5}},
                   {"model": str(full), "parameters": {"weight": 0.25}},
                   {"model": [str(base), str(pair[0]), f"{pair[1]}*0.5"], "parameters": {"weight": -1}}],
    }  # fmt: skip
    pf.merge(recipe, tmp_path / "out")
    a, b = map(exact_deltas, pair)
    exact = finetuned(base, (0.5 - 1, a), (-0.5, b))
    for name, tensor in weights_of(tmp_path / "out").items():
        full_delta = state[name].double() - weights_of(base)[name].double()
        torch.testing.assert_close(tensor.double(), exact[name] + 0.25 * full_delta, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "keys", [{"method": "linear", "weight": [0.25, 0.75]}, {"method": "slerp", "t": 0.3}], ids=lambda k: k["method"]
)
def test_methods_without_differences_see_whole_models(keys, base, pair, tmp_path):
    models = [f"{base}+{pair[0]}", f"{base}+{pair[1]}"]
    pf.merge(out=tmp_path / "out", models=models, **keys)
    whole = [{n: t.float() for n, t in finetuned(base, (1, exact_deltas(f))).items()} for f in pair]
    exact = merge_with_terms(None, whole, **keys)
    for name, tensor in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[name].value, rtol=0, atol=3e-6)


def test_differences_from_another_base_are_those_of_the_whole_models(base, pair, tmp_path):
    other = save_base(tmp_path / "other")
    state = {n: 1.01 * t for n, t in weights_of(base).items()}
    from safetensors.torch import save_file

    save_file(state, other / "model.safetensors")
    pf.merge(out=tmp_path / "out", method="task_arithmetic", base=other, models=[f"{base}+{pair[0]}"], weight=[0.5])
    exact = finetuned(base, (1, exact_deltas(pair[0])))
    for name, tensor in weights_of(tmp_path / "out").items():
        expected = state[name].double() + 0.5 * (exact[name] - state[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-6)


def test_a_module_that_is_not_adapted_is_the_base_bit_for_bit(base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "out", method="ties", density=0.3)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == {n for n in before if not n.endswith(("q_proj.weight", "v_proj.weight"))}


def test_the_result_depends_on_neither_threads_nor_memory_nor_shards(pair, tmp_path):
    from small_models import Transformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(300)
    base = save_base(tmp_path / "base", model, dtype=torch.bfloat16)
    adapters = [save_peft(tmp_path / f"w{s}", model, seed=s, r=7) for s in (1, 2)]
    outs = []
    for place, options in enumerate([{"threads": 1}, {"threads": 3, "max_memory": "20MB", "max_shard_size": "400KB"}]):
        out = tmp_path / f"out{place}"
        pf.apply_adapters(base, adapters, out, method="ties", density=0.3, **options)
        outs.append({n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()})
    assert len(list((tmp_path / "out1").glob("*.safetensors"))) > 1
    assert all(torch.equal(outs[0][n], outs[1][n]) for n in outs[0])


def test_the_memory_that_factors_take_is_planned(base, pair):
    """In fp32, for the batch at hand and the one after it."""
    bare, adapted = (make_plan(load_recipe(apply_recipe(base, some))) for some in (pair[:1], pair))
    factors = [sum(t.numel() for k, t in stored(p).items() if "lora_" in k) for p in pair]
    assert adapted.peak_memory - bare.peak_memory == 2 * 4 * factors[1]
    assert bare.peak_memory > 2 * 4 * factors[0]


def test_factors_of_the_next_batch_are_got_ready_beside_the_merge(pair, tmp_path, monkeypatch):
    import threading

    from small_models import Transformer

    from peta_fast.formats.adapted_checkpoint import AdaptedCheckpoint

    model = Transformer(300)
    base = save_base(tmp_path / "base", model, dtype=torch.bfloat16)
    adapter = save_peft(tmp_path / "w", model, seed=1, r=7)
    prepare, close, beside, left = AdaptedCheckpoint.prepare, AdaptedCheckpoint.close, set(), []

    def noted_prepare(self, name):
        beside.add((threading.current_thread().name, name))
        prepare(self, name)

    def noted_close(self):
        left.extend(self._formed)
        close(self)

    monkeypatch.setattr(AdaptedCheckpoint, "prepare", noted_prepare)
    monkeypatch.setattr(AdaptedCheckpoint, "close", noted_close)
    pf.apply_adapters(base, [adapter], tmp_path / "out", max_memory="12MB")
    assert {thread for thread, _ in beside} == {"peta_fast factors"}
    assert {name for _, name in beside} <= set(weights_of(base)) and not left


def test_a_plan_reads_the_base_once(base, pair):
    recipe = {"method": "task_arithmetic", "base_model": str(base),
              "models": [{"model": f"{base}+{p}", "parameters": {"weight": 1}} for p in pair]}  # fmt: skip
    plan = make_plan(load_recipe(recipe))
    size = sum(t.numel() * t.element_size() for t in weights_of(base).values())
    factors = sum(t.numel() * t.element_size() for p in pair for t in stored(p).values())
    assert plan.bytes_read == size + factors


def test_an_adapter_changed_since_is_not_resumed(base, pair, tmp_path):
    pf.apply_adapters(base, pair[:1], tmp_path / "out")
    config = config_of(pair[0])
    (pair[0] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 77}))
    with pytest.raises(ResourceError, match="another merge"):
        pf.apply_adapters(base, pair[:1], tmp_path / "out", resume=True)


def test_what_does_not_fit_stops_before_any_work(base, pair, tmp_path):
    change_tensors(pair[1], lambda t: {k.replace("v_proj", "v_prj"): v for k, v in t.items()})
    with pytest.raises(
        CompatibilityError, match="'layers.0.v_prj.weight', which .* the nearest there is 'layers.0.v_proj.weight'"
    ):
        pf.apply_adapters(base, pair, tmp_path / "out")
    with pytest.raises(CompatibilityError, match="is an adapter, expected a model"):
        pf.merge(out=tmp_path / "out", method="linear", models=[pair[0]], weight=1.0)
    with pytest.raises(RecipeError, match="one an adapter, got 1"):
        pf.apply_adapters(base, pair, tmp_path / "out", weights=[1.0])
    with pytest.raises(RecipeError, match="at least one adapter"):
        pf.apply_adapters(base, [], tmp_path / "out")
    with pytest.raises(ResourceError, match="lies inside the input"):
        pf.apply_adapters(base, pair[:1], pair[0] / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [{}, {"method": "ties", "density": 0.5}], ids=["sum", "ties"])
def test_nan_in_an_adapter_is_named_and_nothing_is_published(keys, base, pair, tmp_path):
    change_tensors(pair[1], lambda t: t["base_model.model.layers.1.v_proj.lora_B.weight"][:1].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="layers.1.v_proj.lora_B.weight'.*NaN or inf"):
        pf.apply_adapters(base, pair, tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_whole_tensors_of_several_adapters_are_merged_as_differences(base, tmp_path):
    adapters = [save_peft(tmp_path / str(s), seed=s, modules_to_save=["classifier"]) for s in (1, 2)]
    pf.apply_adapters(base, adapters, tmp_path / "out", weights=[0.5, 0.25])
    name, start = "classifier.weight", weights_of(base)["classifier.weight"].double()
    whole = [stored(a)[f"base_model.model.{name}"].double() for a in adapters]
    expected = start + 0.5 * (whole[0] - start) + 0.25 * (whole[1] - start)
    torch.testing.assert_close(weights_of(tmp_path / "out")[name].double(), expected, rtol=0, atol=1e-6)
    with pytest.raises(CompatibilityError, match="both replace it as a whole"):
        pf.merge({"method": "passthrough", "models": [{"model": [str(base), *map(str, adapters)]}]}, tmp_path / "list")


# Extraction


def test_an_extracted_adapter_gives_back_what_was_applied(base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "tuned")
    report = pf.extract_adapter(tmp_path / "tuned", base, tmp_path / "out", rank=8)
    plain = in_plain_peft(tmp_path / "out")
    assert largest_difference(plain(tokens()), loaded(tmp_path / "tuned")(tokens())) < 2e-6
    assert {m.rank for m in report.modules} == {8} and report.relative_error < 1e-6
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("memory", ["768MB", "1KB"], ids=["kept", "read again"])
def test_extraction_states_its_error_and_is_near_the_best(memory, base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "tuned")
    report = pf.extract_adapter(tmp_path / "tuned", base, tmp_path / "out", rank=3, max_memory=memory)
    found, tuned, start = exact_deltas(tmp_path / "out"), weights_of(tmp_path / "tuned"), weights_of(base)
    for module in report.modules:
        delta = (tuned[f"{module.name}.weight"] - start[f"{module.name}.weight"]).double()
        best = torch.linalg.svdvals(delta)[3:].norm().item()
        measured = (found[module.name] - delta).norm().item()
        assert module.error == pytest.approx(measured, rel=1e-3) and measured <= 1.001 * best


def test_an_energy_chooses_the_ranks(base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "tuned")
    report = pf.extract_adapter(tmp_path / "tuned", base, tmp_path / "out", rank=8, energy=0.8)
    for module in report.modules:
        assert module.energy >= 0.8 - 1e-6 and module.rank < 8
    in_plain_peft(tmp_path / "out")


def fully_tuned(base, tmp_path):
    from safetensors.torch import save_file

    tuned = save_base(tmp_path / "tuned")
    draw = torch.Generator().manual_seed(0)
    state = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in weights_of(base).items()}
    save_file(state, tuned / "model.safetensors")
    return tuned


def test_what_extraction_leaves_out_counts_as_error_by_name(base, tmp_path):
    tuned = fully_tuned(base, tmp_path)
    report = pf.extract_adapter(tuned, base, tmp_path / "out", rank=12)
    left = {m.name for m in report.modules if m.rank == 0}
    assert {"embed.weight", "norm.weight", "classifier.bias", "layers.0.q_proj.bias"} <= left
    assert any("embed.weight" in note for note in report.notes) and report.relative_error > 0.1
    with pytest.raises(CompatibilityError, match="changed outside the chosen modules"):
        pf.extract_adapter(tuned, base, tmp_path / "refused", rank=12, rest="refuse")


def test_the_rest_is_saved_whole_where_that_is_asked(base, tmp_path):
    tuned = fully_tuned(base, tmp_path)
    report = pf.extract_adapter(tuned, base, tmp_path / "out", rank=12, rest="save")
    assert report.relative_error < 1e-6 and not report.notes
    assert largest_difference(in_plain_peft(tmp_path / "out")(tokens()), loaded(tuned)(tokens())) < 5e-6
    pf.apply_adapters(base, [tmp_path / "out"], tmp_path / "again")
    for name, tensor in weights_of(tmp_path / "again").items():
        assert largest_difference(tensor, weights_of(tuned)[name]) < 1e-6


def test_targets_of_extraction(base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "tuned")
    report = pf.extract_adapter(
        tmp_path / "tuned", base, tmp_path / "out", rank=8, targets=["0.q_proj", r"layers\.1\..*"]
    )
    assert [m.name for m in report.modules if m.rank] == ["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"]
    with pytest.raises(RecipeError, match="'q_porj' matches no matrix"):
        pf.extract_adapter(tmp_path / "tuned", base, tmp_path / "x", targets=["q_porj"])


def test_conv1d_layers_are_extracted_transposed(tmp_path):
    from test_formats_lora_adapter import layouts

    pytest.importorskip("transformers")
    model = layouts()
    base = save_base(tmp_path / "base", model, config={"model_type": "gpt2"})
    adapter = save_peft(tmp_path / "a", model, target_modules=["c_attn", "c_square"], fan_in_fan_out=True)
    pf.apply_adapters(base, [adapter], tmp_path / "tuned")
    pf.extract_adapter(tmp_path / "tuned", base, tmp_path / "out", rank=3, targets=["c_attn", "c_square"])
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True
    tuned = model.__class__()
    tuned.load_state_dict(weights_of(tmp_path / "tuned"))
    assert largest_difference(in_plain_peft(tmp_path / "out", model)(tokens() % 11), tuned(tokens() % 11)) < 1e-5


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"rank": 0}, "integer of at least 1"),
        ({"energy": 1.5}, "share above 0"),
        ({"rest": "keep"}, "expected one of drop"),
        ({"dtype": "x"}, "float32"),
    ],
)
def test_settings_of_extraction_are_checked(keys, message, base, tmp_path):
    with pytest.raises(RecipeError, match=message):
        pf.extract_adapter(base, base, tmp_path / "out", **keys)


def test_models_that_do_not_fit_are_refused(base, pair, tmp_path):
    from small_models import Transformer

    other = save_base(tmp_path / "other", Transformer(16))
    with pytest.raises(CompatibilityError, match=r"'classifier.weight' is \[3, 16\], in .* \[3, 12\]"):
        pf.extract_adapter(other, base, tmp_path / "out")
    with pytest.raises(CompatibilityError, match="changes none of the chosen modules"):
        pf.extract_adapter(base, save_base(tmp_path / "same"), tmp_path / "out")
    from safetensors.torch import save_file

    state = weights_of(base)
    state["layers.0.q_proj.weight"][0, 0] = torch.nan
    bad = save_base(tmp_path / "bad")
    save_file(state, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match="'layers.0.q_proj.weight': expected finite values"):
        pf.extract_adapter(bad, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_is_as_accurate_as_every_merge(base, pair, tmp_path):
    pf.apply_adapters(base, pair, tmp_path / "out", method="task_arithmetic", weights=[0.5, 2.0])
    state = weights_of(base)
    models = [{n: (state[n].double() + d.double()) for n, d in formed_deltas(f, state).items()} for f in pair]
    exact = merge_with_terms(
        {n: t.double() for n, t in state.items()},
        models,
        method="task_arithmetic",
        weight=[0.5, 2.0],
        decisions=torch.float64,
    )
    for name, tensor in weights_of(tmp_path / "out").items():
        assert_close_to_reference(tensor, exact[name], 2)
