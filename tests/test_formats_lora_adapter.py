"""Adapters as they are found: every key is understood or named, and what a config says is held against the file."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_files import (
    change_config,
    change_tensors,
    exact_deltas,
    save_base,
    save_peft,
    stored,
)
from safetensors.torch import save_file
from small_models import transformer
from torch import nn

from peta_fast.errors import CheckpointError, CompatibilityError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.adapted_checkpoint import AdaptedCheckpoint
from peta_fast.formats.lora_adapter import open_adapter
from peta_fast.ops.factors import formed

pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")
Q = "base_model.model.layers.0.q_proj"

FORMS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"0.q_proj": 5, "v_proj": 2}, "alpha_pattern": {"v_proj": 11, "1.q_proj": 4}},
    "half": {"dtype": torch.bfloat16},
    "double": {"dtype": torch.float64},
}


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_factors_and_scalings_are_those_of_the_files(fields, tmp_path):
    folder = save_peft(tmp_path / "a", **fields)
    adapter, exact = open_adapter(folder), exact_deltas(folder)
    assert set(adapter.modules) == set(exact) and not adapter.replaced
    for name, module in adapter.modules.items():
        A, B = adapter.factors(module)
        assert A.dtype == ("float64" if fields.get("dtype") == torch.float64 else "float32")
        torch.testing.assert_close(
            module.scaling * torch.from_numpy(B).double() @ torch.from_numpy(A).double(), exact[name]
        )
    if "rank_pattern" in fields:
        found = {n: (m.rank, m.alpha) for n, m in adapter.modules.items()}
        assert found == {
            "layers.0.q_proj": (5, 6),
            "layers.0.v_proj": (2, 11),
            "layers.1.q_proj": (3, 4),
            "layers.1.v_proj": (2, 11),
        }
        assert adapter.modules["layers.0.q_proj"].scaling == 6 / 5
    if fields.get("use_rslora"):
        assert adapter.modules["layers.0.q_proj"].scaling == 5 / math.sqrt(3)


def test_modules_trained_in_full_and_biases_are_whole_tensors(tmp_path):
    adapter = open_adapter(save_peft(tmp_path / "a", modules_to_save=["classifier"], bias="lora_only"))
    assert set(adapter.replaced) == {"classifier.weight", "classifier.bias"} | {
        f"layers.{i}.{p}.bias" for i in (0, 1) for p in ("q_proj", "v_proj")
    }


def test_names_of_adapters_and_wrappers_drop_out_of_keys(tmp_path):
    folder = save_peft(tmp_path / "a", modules_to_save=["classifier"])
    before = open_adapter(folder)

    def rename(tensors):
        renamed = {
            k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
            for k, t in tensors.items()
        }
        return {k.replace("classifier.", "classifier.modules_to_save.default.").removeprefix("base_model.model."): t
                for k, t in renamed.items()}  # fmt: skip

    change_tensors(folder, rename)
    after = open_adapter(folder)
    assert set(after.modules) == set(before.modules) and set(after.replaced) == set(before.replaced)


def test_a_torch_zip_file_is_read_without_running_it(tmp_path):
    folder = save_peft(tmp_path / "a")
    exact = exact_deltas(folder)
    torch.save(stored(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    adapter = open_adapter(folder)
    for name, module in adapter.modules.items():
        A, B = (torch.from_numpy(f).double() for f in adapter.factors(module))
        torch.testing.assert_close(module.scaling * B @ A, exact[name])


VARIANTS = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "experts": ({"target_parameters": ["experts.weight"]}, "target_parameters"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "unheard of": ({"use_hyperlora": True}, "use_hyperlora"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "IA3": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_refused_by_name(name, tmp_path):
    fields, named = VARIANTS[name]
    folder = save_peft(tmp_path / "a")
    change_config(folder, **fields)
    with pytest.raises(CompatibilityError, match="expected plain LoRA, got") as caught:
        open_adapter(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("key, named", [("lora_magnitude_vector.weight", "DoRA"), ("lora_B.bias", "a variant of LoRA"),
                                        ("token_adapter.trainable_tokens_delta", "trainable tokens")])  # fmt: skip
def test_keys_of_variants_are_refused_whatever_the_config_says(key, named, tmp_path):
    folder = save_peft(tmp_path / "a")
    change_tensors(folder, lambda t: t.update({f"{Q}.{key}": torch.zeros(3)}))
    with pytest.raises(CompatibilityError, match=f"belongs to {named}"):
        open_adapter(folder)


DAMAGED = {
    "a factor is missing": (
        lambda t: t.pop(f"{Q}.lora_B.weight"),
        "'layers.0.q_proj' has lora_A, expected lora_A and lora_B",
    ),
    "ranks differ": (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(12, 2)}), "expected one rank of at least 1"),
    "rank 0": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 12), f"{Q}.lora_B.weight": torch.zeros(12, 0)}),
        "expected one rank of at least 1",
    ),
    "no matrix": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3)}), r"expected \[r, in\], \[out, r\]"),
    "two adapters": (
        lambda t: {k.replace("lora_A.", f"lora_A.{'x' if '0.q' in k else 'y'}."): v for k, v in t.items()},
        "holds several adapters: x, y",
    ),
    "nothing": (
        lambda t: {"base_model.model.classifier.bias": torch.zeros(3)},
        "expected the factors of a LoRA adapter, found none",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path):
    change, message = DAMAGED[name]
    folder = save_peft(tmp_path / "a")
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(folder)


@pytest.mark.parametrize("fields", [{"r": 4}, {"rank_pattern": {"q_proj": 7}}], ids=["r", "pattern"])
def test_a_rank_that_the_config_denies_is_refused(fields, tmp_path):
    folder = save_peft(tmp_path / "a")
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match="'layers.0.q_proj' has rank 3, but adapter_config.json says"):
        open_adapter(folder)


def test_a_folder_without_config_or_weights_is_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="found no adapter_config.json"):
        open_adapter(tmp_path)
    folder = save_peft(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors or adapter_model.bin, found neither"):
        open_adapter(folder)
    change_config_text(folder, "[1, 2]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        open_adapter(folder)


def change_config_text(folder, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_named(value, tmp_path):
    folder = save_peft(tmp_path / "a")
    change_tensors(folder, lambda t: t[f"{Q}.lora_A.weight"].view(-1)[:2].fill_(value) is None)
    adapter = open_adapter(folder)
    with pytest.raises(CheckpointError, match="lora_A.weight': expected finite values, got 2 NaN or inf"):
        adapter.factors(adapter.modules["layers.0.q_proj"])


class Layouts(nn.Module):
    """What LoRA goes on besides Linear: Conv1D (weights [in, out]), Embedding, Conv2d."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 6)
        self.c_attn, self.c_square = Conv1D(9, 6), Conv1D(9, 9)
        self.conv = nn.Conv2d(1, 4, (3, 2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.c_square(self.c_attn(self.embed(tokens)))
        return self.conv(hidden[:, None]).flatten(1)


def layouts() -> Layouts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Layouts().eval()


@pytest.mark.parametrize("conv1d", [True, False], ids=["said", "set right by PEFT"])
def test_every_layout_is_changed_as_peft_changes_it(conv1d, tmp_path):
    from adapter_files import in_plain_peft

    pytest.importorskip("transformers")
    model = layouts()
    targets = ["c_attn", "c_square", "embed", "conv"]
    folder = save_peft(tmp_path / "a", model, target_modules=targets, fan_in_fan_out=conv1d)
    base = open_checkpoint(save_base(tmp_path / "base", model))
    ours = AdaptedCheckpoint(base, [(open_adapter(folder), 1.0)])
    merged = in_plain_peft(folder, model).merge_and_unload().state_dict()
    for name in ("embed.weight", "c_attn.weight", "c_square.weight", "conv.weight"):
        shape = base.tensors[name].shape
        found = torch.from_numpy(formed(ours.buffer(name))).reshape(shape)
        torch.testing.assert_close(found, merged[name], rtol=0, atol=2e-6)
        assert (found - model.state_dict()[name]).abs().max() > 0.01


def test_a_square_weight_whose_way_cannot_be_known_is_refused(tmp_path):
    pytest.importorskip("transformers")
    model = layouts()
    folder = save_peft(tmp_path / "a", model, target_modules=["c_attn", "c_square"], fan_in_fan_out=True)
    change_config(folder, fan_in_fan_out=False)
    base = open_checkpoint(save_base(tmp_path / "base", model))
    with pytest.raises(CompatibilityError, match="'c_square.weight' lies, which is square, cannot be known"):
        AdaptedCheckpoint(base, [(open_adapter(folder), 1.0)])


def adapted(tmp_path, change=None, base=None, weight=1.0, **fields) -> AdaptedCheckpoint:
    folder = save_peft(tmp_path / "a", **fields)
    if change:
        change_tensors(folder, change)
    return AdaptedCheckpoint(open_checkpoint(save_base(tmp_path / "base", base)), [(open_adapter(folder), weight)])


def renamed(old: str, new: str):
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


def test_a_key_that_matches_nothing_stops_the_run_with_the_nearest_name(tmp_path):
    with pytest.raises(CompatibilityError) as caught:
        adapted(tmp_path, renamed("layers.1.q_proj", "layers.1.q_porj"))
    assert "'base_model.model.layers.1.q_porj.lora_A.weight' changes 'layers.1.q_porj.weight'" in str(caught.value)
    assert "the nearest there is 'layers.1.q_proj.weight'" in str(caught.value)


def test_a_whole_tensor_that_matches_nothing_stops_the_run_too(tmp_path):
    with pytest.raises(
        CompatibilityError, match="'clasifier.bias', which .* lacks; the nearest there is 'classifier.bias'"
    ):
        adapted(tmp_path, renamed("classifier", "clasifier"), modules_to_save=["classifier"])


def test_another_base_is_known_by_its_shapes(tmp_path):
    from small_models import Transformer

    with pytest.raises(CompatibilityError, match=r"as one of \[12, 12\], but it is \[16, 16\]"):
        adapted(tmp_path, base=Transformer(16))


def test_whole_tensors_of_another_shape_are_refused(tmp_path):
    with pytest.raises(CompatibilityError, match=r"\[4, 12\], but it is \[3, 12\]"):
        adapted(tmp_path, lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(4, 12)}))


def test_a_whole_tensor_takes_no_weight_in_a_list(tmp_path):
    with pytest.raises(CompatibilityError, match="must be 1, got 0.5"):
        adapted(tmp_path, weight=0.5, modules_to_save=["classifier"])


def test_a_base_that_cannot_be_added_to_is_refused(tmp_path):
    folder = save_peft(tmp_path / "a")
    state = {n: t.to(torch.float8_e4m3fn) for n, t in transformer(torch.float32).state_dict().items()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors")
    with pytest.raises(CompatibilityError, match="is F8_E4M3, expected F32, F16, BF16 under an adapter"):
        AdaptedCheckpoint(open_checkpoint(base), [(open_adapter(folder), 1.0)])


def test_a_tied_name_is_untied_where_one_of_the_two_is_changed(tmp_path):
    state = {n: t.contiguous() for n, t in transformer(torch.float32).state_dict().items()}
    base = tmp_path / "base"
    base.mkdir()
    tie = {"layers.1.q_proj.weight": "layers.0.q_proj.weight", "layers.1.k_proj.weight": "layers.0.k_proj.weight"}
    save_file({n: t for n, t in state.items() if n not in tie}, base / "model.safetensors", tie)
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    folder = save_peft(tmp_path / "a", target_modules=["layers.1.q_proj"])
    ours = AdaptedCheckpoint(open_checkpoint(base), [(open_adapter(folder), 1.0)])
    assert ours.aliases == {"layers.1.k_proj.weight": "layers.0.k_proj.weight"}
    assert ours.config["tie_word_embeddings"] is False
    expected = state["layers.0.q_proj.weight"].double() + exact_deltas(folder)["layers.1.q_proj"]
    found = torch.from_numpy(formed(ours.buffer("layers.1.q_proj.weight"))).reshape(12, 12)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert bytes(ours.buffer("layers.0.q_proj.weight").as_bytes()) == state["layers.0.q_proj.weight"].numpy().tobytes()
