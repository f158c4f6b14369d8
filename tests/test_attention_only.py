"""Attention-only fine-tuning: which weights train under which names, what is saved, and what a merge makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from families import assert_same_bits
from model_folders import load
from small_models import tokens, transformer
from torch import nn

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.nn import fused_qkv, separate_qkv
from peta_fast.nn.attention_only import attention_weights

D = 8


def block(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def linear(outputs: int = D) -> nn.Linear:
    return nn.Linear(D, outputs)


class Conv1D(nn.Module):
    """transformers' layer of that name."""

    def __init__(self):
        super().__init__()
        self.nf = 3 * D
        self.weight, self.bias = nn.Parameter(torch.zeros(D, 3 * D)), nn.Parameter(torch.zeros(3 * D))


def timm_block() -> nn.Module:
    attn = block(qkv=linear(3 * D), q_norm=nn.LayerNorm(D), proj=linear(), proj_drop=nn.Dropout())
    return block(norm1=nn.LayerNorm(D), attn=attn, mlp=block(fc1=linear(), fc2=linear()))


def bert_block() -> nn.Module:
    own = block(query=linear(), key=linear(), value=linear())
    attention = block(self=own, output=block(dense=linear(), LayerNorm=nn.LayerNorm(D)))
    return block(attention=attention, intermediate=block(dense=linear()), output=block(dense=linear()))


def llama_block() -> nn.Module:
    attention = block(q_proj=linear(), k_proj=linear(), v_proj=linear(), o_proj=linear())
    mlp = block(gate_proj=linear(), up_proj=linear(), down_proj=linear())
    return block(self_attn=attention, mlp=mlp, post_attention_layernorm=nn.LayerNorm(D))


def gpt2_block() -> nn.Module:
    return block(attn=block(c_attn=Conv1D(), c_proj=Conv1D()), mlp=block(c_fc=Conv1D(), c_proj=Conv1D()))


def t5_block() -> nn.Module:
    parts = {"q": linear(), "k": linear(), "v": linear(), "o": linear(), "relative_attention_bias": nn.Embedding(4, 2)}
    layer = nn.ModuleList([block(SelfAttention=block(**parts)), block(DenseReluDense=block(wi=linear(), wo=linear()))])
    return block(layer=layer)


def neox_block() -> nn.Module:
    attention = block(query_key_value=linear(3 * D), dense=linear())
    return block(attention=attention, mlp=block(dense_h_to_4h=linear(), dense=linear()))


def diffusers_block() -> nn.Module:
    attention = block(to_q=linear(), to_k=linear(), to_v=linear(), to_out=nn.ModuleList([linear(), nn.Dropout()]))
    return block(attn1=attention, ff=block(net=nn.ModuleList([linear()])))


def open_clip_block() -> nn.Module:
    return block(attn=nn.MultiheadAttention(D, 2), mlp=block(c_fc=linear(), c_proj=linear()), ln_1=nn.LayerNorm(D))


def apart_block() -> nn.Module:
    return block(attention=nn.MultiheadAttention(D, 2, kdim=4, vdim=6))


def nested_block() -> nn.Module:
    """A block called attention that holds more than attention."""
    return block(attn_block=block(attention=block(qkv=linear(3 * D), proj=linear()), mlp=block(proj=linear())))


FAMILIES = {
    nested_block: ("attn_block.attention.qkv.weight", "attn_block.attention.proj.weight"),
    timm_block: ("attn.qkv.weight", "attn.proj.weight"),
    bert_block: (
        "attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight",
        "attention.output.dense.weight",
    ),
    llama_block: tuple(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
    gpt2_block: ("attn.c_attn.weight", "attn.c_proj.weight"),
    t5_block: tuple(f"layer.0.SelfAttention.{letter}.weight" for letter in "qkvo"),
    neox_block: ("attention.query_key_value.weight", "attention.dense.weight"),
    diffusers_block: ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "attn1.to_out.0.weight"),
    open_clip_block: ("attn.in_proj_weight", "attn.out_proj.weight"),
    apart_block: (
        "attention.q_proj_weight", "attention.k_proj_weight", "attention.v_proj_weight", "attention.out_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_exactly_the_attention_projections_train(make):
    model = block(embed=nn.Embedding(5, D), blocks=nn.ModuleList([make(), make()]), norm=nn.LayerNorm(D), head=linear())
    assert pf.attention_only(model) is model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"blocks.{layer}.{name}" for layer in range(2) for name in FAMILIES[make]]


def test_q_k_and_v_side_by_side_are_attention_whatever_the_module_is_called():
    model = transformer()
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert list(attention_weights(model)) == [f"layers.{i}.{part}.weight" for i in range(2) for part in parts]


def test_other_names_can_be_given():
    model = block(mixer=block(alpha=linear(), beta=linear()), head=linear())
    pf.attention_only(model, ["alpha", "mixer.beta"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["mixer.alpha.weight", "mixer.beta.weight"]
    with pytest.raises(RecipeError, match="'gamma'"):
        pf.attention_only(model, ["gamma"])


def test_a_model_without_attention_is_told_what_it_has():
    model = block(layers=nn.ModuleList([block(fc1=linear(), fc2=linear())]), head=linear())
    with pytest.raises(RecipeError, match=r"(?s)no attention projection.*it has: 'fc1', 'fc2', 'head'.*target_modules"):
        pf.attention_only(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RecipeError, match=r"inside of attention modules: 'attention.mix'"):
        pf.attention_only(block(layers=nn.ModuleList([block(attention=block(mix=linear()), fc1=linear())])))
    with pytest.raises(RecipeError, match="It has no Linear"):
        pf.attention_only(block(norm=nn.LayerNorm(D)))


def test_quantized_weights_are_refused():
    model = llama_block()
    model.self_attn.q_proj.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(CompatibilityError, match="self_attn.q_proj.weight: is torch.uint8"):
        pf.attention_only(model)


class Encoder(nn.Module):
    """open_clip's shape: one nn.MultiheadAttention and an MLP, with a config."""

    class config:
        @staticmethod
        def to_dict():
            return {"model_type": "encoder"}

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.attn, self.norm = nn.MultiheadAttention(D, 2, batch_first=True), nn.LayerNorm(D)
        self.mlp, self.head = linear(), nn.Linear(D, 3)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        hidden = hidden + self.attn(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(torch.tanh(self.mlp(self.norm(hidden))).mean(1))


def trained_encoder(seed: int) -> Encoder:
    torch.manual_seed(0)
    model = pf.attention_only(Encoder())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    torch.manual_seed(seed)
    labels = torch.randint(0, 3, (4,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens(seed)), labels).backward()
        optimizer.step()
    return model


def test_training_saving_merging_and_loading(tmp_path):
    torch.manual_seed(0)
    base = Encoder()
    start = {n: t.clone() for n, t in base.state_dict().items()}
    tuned = [trained_encoder(seed) for seed in (1, 2)]
    for model in tuned:
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
        assert moved == {"attn.in_proj_weight", "attn.out_proj.weight"}
    for name, model in zip("ab", tuned, strict=True):
        pf.save_trained(model, tmp_path / name)
        assert set(load(tmp_path / name)) == moved
        assert json.loads((tmp_path / name / "config.json").read_text()) == {"model_type": "encoder"}
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file(start, tmp_path / "base" / "model.safetensors")
    pf.merge(out=tmp_path / "out", method="task_arithmetic", base=tmp_path / "base",
             models=[tmp_path / "a", tmp_path / "b"], weight=0.5)  # fmt: skip
    states = [m.state_dict() for m in tuned]
    assert_same_bits(load(tmp_path / "out"), pf.merge_state_dicts(start, states, method="task_arithmetic", weight=0.5))
    loaded = pf.load_trained(base, tmp_path / "a")
    assert_same_bits(loaded.state_dict(), tuned[0].state_dict())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_fused_and_separate_projections_merge_alike(method):
    """q, k and v are the row blocks 0..d, d..2d, 2d..3d of in_proj."""
    states = [trained_encoder(seed).state_dict() for seed in (1, 2)]
    torch.manual_seed(0)
    base = Encoder().state_dict()
    separate = separate_qkv(base)
    assert torch.equal(separate["attn.k_proj.weight"], base["attn.in_proj_weight"][D : 2 * D])
    assert torch.equal(separate["attn.v_proj.bias"], base["attn.in_proj_bias"][2 * D :])
    assert_same_bits(fused_qkv(separate), dict(base))
    fused = pf.merge_state_dicts(base, states, method=method, weight=0.7)
    apart = pf.merge_state_dicts(separate, [separate_qkv(s) for s in states], method=method, weight=0.7)
    assert_same_bits(fused_qkv(apart), fused)


def test_projections_that_cannot_be_cut_or_joined_are_named():
    with pytest.raises(CompatibilityError, match="attn.in_proj_weight: has 8 rows"):
        separate_qkv({"attn.in_proj_weight": torch.ones(8, 8)})
    with pytest.raises(CompatibilityError, match="attn.v_proj.weight: is missing beside 'attn.q_proj.weight'"):
        fused_qkv({"attn.q_proj.weight": torch.ones(8, 8), "attn.k_proj.weight": torch.ones(8, 8)})
