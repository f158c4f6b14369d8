"""What save_adapter writes: plain PEFT loads it with the same function, we load it with the same point and step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small_models import base, linearized, stepped, tokens
from torch import nn

import peta_fast as pf
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError
from peta_fast.formats.peft_adapter import LinearizedFactors, plain_factors, refuse_variants, target_modules

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")


def in_plain_peft(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """What PEFT itself makes of the folder, on the base model."""
    return peft.PeftModel.from_pretrained(base() if model is None else model, str(folder)).eval()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def test_the_plain_factors_of_a_layer_worked_by_hand():
    """s = 2, A0 = [1 2], B0 = [3; 4], dA = [0 1], dB = [1; 0]: dW = 2 ([4; 4] [1 2] + [3; 4] [0 1])."""
    A0, B0, dA, dB = (torch.tensor(t) for t in ([[1.0, 2.0]], [[3.0], [4.0]], [[0.0, 1.0]], [[1.0], [0.0]]))
    A, B = plain_factors(LinearizedFactors(A0, B0, dA, dB, 2.0, 2.0))
    assert A.tolist() == [[1, 2], [0, 1]] and B.tolist() == [[8, 6], [8, 8]]
    assert (B @ A).tolist() == [[8, 22], [8, 24]]
    A, B = plain_factors(LinearizedFactors(A0, None, None, dB, 2.0, 2.0))
    assert A.tolist() == [[1, 2]] and B.tolist() == [[2], [0]]


SETTINGS = {
    "B0-zero": {"init": "lora"},
    "B0-not-zero": {"init": "gaussian"},
    "rslora": {"init": "gaussian", "rslora": True, "alpha": 5},
    "patterns": {"init": "gaussian", "rank_pattern": {"0.q_proj": 5, "v_proj": 2}, "alpha_pattern": {"v_proj": 11}},
    "dropout": {"init": "gaussian", "dropout": 0.3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_plain_peft_computes_the_same_in_fp64(settings, tmp_path):
    model = linearized(**settings).eval()
    pf.save_adapter(model, tmp_path)
    plain = in_plain_peft(tmp_path)
    assert largest_difference(plain(tokens()), base()(tokens())) > 1e-2
    assert largest_difference(plain(tokens()), model(tokens())) < 1e-12


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_plain_peft_computes_the_same_in_fp32_to_rounding(init, tmp_path):
    model = linearized(init, torch.float32)
    pf.save_adapter(model, tmp_path)
    assert largest_difference(in_plain_peft(tmp_path, base().float())(tokens()), model(tokens())) < 1e-6


@pytest.mark.parametrize(("init", "rank"), [("lora", 3), ("gaussian", 6)])
def test_the_files_are_what_they_are_said_to_be(init, rank, tmp_path):
    model = linearized(init, torch.float32)
    pf.save_adapter(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "linearization.safetensors",
    ]  # fmt: skip
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["peft_type"] == "LORA"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.layers.1.v_proj"
    assert stored[f"{name}.lora_A.weight"].shape == (rank, 12) and stored[f"{name}.lora_B.weight"].shape == (12, rank)
    assert len(stored) == 8 and {t.dtype for t in stored.values()} == {torch.float32}
    layer, parts = model.layers[1].v_proj, ["A0", "delta_B"] if init == "lora" else ["A0", "B0", "delta_A", "delta_B"]
    with safe_open(tmp_path / "linearization.safetensors", framework="pt") as sidecar:
        metadata = sidecar.metadata()
        keys = {k for k in sidecar.keys() if k.startswith("layers.1.v_proj.")}  # noqa: SIM118
        assert keys == {f"layers.1.v_proj.{part}" for part in parts}
        for part in parts:
            assert torch.equal(sidecar.get_tensor(f"layers.1.v_proj.{part}"), getattr(layer, part))
    assert (metadata["format_version"], metadata["scope"]) == ("1", "layer")
    assert json.loads(metadata["scaling"])["layers.1.v_proj"] == 2.0


def test_half_precision_is_written_in_fp32(tmp_path):
    model = pf.linearize(base().bfloat16(), ["q_proj"], autocast_adapter_dtype=False)
    pf.save_adapter(stepped(model), tmp_path)
    for file in ("adapter_model.safetensors", "linearization.safetensors"):
        assert {t.dtype for t in load_file(tmp_path / file).values()} == {torch.float32}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loaded_again_the_point_and_the_step_are_bit_for_bit_the_same(settings, tmp_path):
    model = linearized(**settings)
    pf.save_adapter(model, tmp_path)
    loaded = pf.load_adapter(base(), tmp_path)
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    assert torch.equal(loaded.eval()(tokens()), model.eval()(tokens()))
    assert loaded.layers[0].q_proj.dropout == model.layers[0].q_proj.dropout
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_loaded_for_inference_nothing_is_trained(tmp_path):
    pf.save_adapter(linearized(), tmp_path)
    assert not any(p.requires_grad for p in pf.load_adapter(base(), tmp_path, is_trainable=False).parameters())


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path):
    first, second = linearized(), stepped(linearized(), seed=8)
    pf.save_adapter(second, tmp_path)
    loaded = pf.load_adapter(first, tmp_path, adapter_name="second")
    assert torch.equal(loaded(tokens()), second(tokens()))
    pf.set_adapter(loaded, "default")
    assert torch.equal(loaded(tokens()), linearized()(tokens()))
    pf.add_adapters(loaded, {"default": 1.0, "second": 1.0}, "sum")


def test_an_adapter_of_that_name_is_overwritten_at_its_own_point_only(tmp_path):
    pf.save_adapter(stepped(linearized(), seed=8), tmp_path)
    loaded = pf.load_adapter(linearized(), tmp_path)
    assert torch.equal(loaded(tokens()), stepped(linearized(), seed=8)(tokens()))
    with pytest.raises(CompatibilityError, match="linearized around different points"):
        pf.load_adapter(linearized(seed=1), tmp_path)


def test_modules_trained_in_full_are_saved_with_it(tmp_path):
    model = linearized(modules_to_save=["classifier"])
    pf.save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier"]
    assert largest_difference(in_plain_peft(tmp_path)(tokens()), model(tokens())) < 1e-12
    loaded = pf.load_adapter(base(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens())) and loaded.classifier.weight.requires_grad


def test_a_trained_base_weight_is_refused(tmp_path):
    model = linearized()
    model.layers[0].q_proj.bias.requires_grad_(True)
    with pytest.raises(CompatibilityError, match="layers.0.q_proj: its bias is trained"):
        pf.save_adapter(model, tmp_path)


def test_of_several_active_adapters_one_must_be_named(tmp_path):
    model = linearized()
    pf.linearize(model, ["q_proj"], adapter_name="b")
    pf.set_adapter(model, ["default", "b"])
    with pytest.raises(RecipeError, match="2 adapters are active: b, default\nGive adapter_name"):
        pf.save_adapter(model, tmp_path)
    pf.save_adapter(model, tmp_path, adapter_name="b")
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4


def test_a_conv1d_is_saved_as_peft_reads_it(tmp_path):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    plain = nn.Sequential(conv1d(5, 7)).double()
    expected = nn.Sequential(conv1d(5, 7)).double()
    expected.load_state_dict(plain.state_dict())
    model = stepped(pf.linearize(plain, ["0"], r=2, alpha=4, init="gaussian"))
    pf.save_adapter(model, tmp_path)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    assert largest_difference(in_plain_peft(tmp_path, expected)(x), model(x)) < 1e-12


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_delinearized_it_is_a_plain_peft_model_with_the_same_function(init):
    model = linearized(init, modules_to_save=["classifier"])
    expected = model(tokens())
    plain = pf.delinearize(model)
    assert isinstance(plain, peft.PeftModel)
    kinds = {type(m) for m in plain.modules() if isinstance(m, peft.tuners.lora.layer.LoraLayer)}
    assert kinds == {peft.tuners.lora.layer.Linear}
    assert largest_difference(plain(tokens()), expected) < 1e-12


def test_delinearized_and_disabled_it_is_the_base_model():
    plain = pf.delinearize(linearized())
    with plain.disable_adapter():
        assert torch.equal(plain(tokens()), base()(tokens()))


def test_delinearizing_keeps_all_adapters():
    model = linearized()
    pf.linearize(model, ["q_proj"], adapter_name="b", r=2, alpha=2, init="gaussian")
    expected = {}
    for name in ("b", "default"):
        pf.set_adapter(model, name)
        expected[name] = model(tokens())
    plain = pf.delinearize(model)
    for name, logits in expected.items():
        plain.set_adapter(name)
        assert largest_difference(plain(tokens()), logits) < 1e-12


@pytest.mark.parametrize(
    ("adapted", "everything", "expected"),
    [
        (["a.q", "b.q"], ["a.q", "b.q", "a.v"], ["q"]),
        (["a.q"], ["a.q", "b.q"], r"a\.q"),
        (["q"], ["q", "a.q"], "q"),
    ],
    ids=["short", "one-of-two", "top"],
)
def test_target_modules_name_exactly_the_adapted(adapted, everything, expected):
    assert target_modules(adapted, everything) == expected


def test_modules_that_share_a_last_name_are_told_apart(tmp_path):
    model = stepped(pf.linearize(base(), ["0.q_proj"], r=2, alpha=4, init="gaussian"))
    pf.save_adapter(model, tmp_path)
    plain = in_plain_peft(tmp_path)
    assert sum(isinstance(m, peft.tuners.lora.layer.Linear) for m in plain.modules()) == 1
    assert largest_difference(plain(tokens()), model(tokens())) < 1e-12


# what is refused


def saved(tmp_path: Path) -> Path:
    pf.save_adapter(linearized(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_plain_adapter_is_sent_to_peft(tmp_path):
    folder = saved(tmp_path)
    (folder / "linearization.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="found no linearization.safetensors\nFor a plain adapter: load it with peft"
    ):
        pf.load_adapter(base(), folder)


def test_a_truncated_file_is_named(tmp_path):
    file = saved(tmp_path) / "linearization.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="linearization.safetensors: cannot be read"):
        pf.load_adapter(base(), file.parent)


def rewritten(folder: Path, change) -> Path:
    """The sidecar after change(tensors, metadata)."""
    file = folder / "linearization.safetensors"
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t, m: m.update(format_version="2"), CheckpointError, "format_version is '2', expected '1'"),
        (lambda t, m: m.pop("scaling"), CheckpointError, "holds no JSON object 'scaling'"),
        (lambda t, m: m.update(alpha="{"), CheckpointError, "holds no JSON object 'alpha'"),
        (lambda t, m: m.update(scaling="{}"), CheckpointError, r"without \['scaling'\]"),
        (
            lambda t, m: t.pop("layers.0.q_proj.B0"),
            CheckpointError,
            r"'layers.0.q_proj' has \['A0', 'delta_A', 'delta_B'\]",
        ),
        (lambda t, m: t.clear(), CheckpointError, "holds no module"),
        (
            lambda t, m: t.update({f"layers.0.q_proj.{part}": torch.zeros(3, 11) for part in ("A0", "delta_A")}),
            CompatibilityError,
            r"layers.0.q_proj: the adapter's A0 is \[3, 11\], expected \[3, 12\]",
        ),
        (
            lambda t, m: t.update({"layers.0.q_proj.A0": torch.zeros(3, 11)}),
            CheckpointError,
            r"'layers.0.q_proj' has A0 \[3, 11\], .*expected A0 and delta_A \[r, in\]",
        ),
        (lambda t, m: t.update({"layers.0.q_proj.A0": torch.zeros(3)}), CheckpointError, r"has A0 \[3\]"),
        (
            lambda t, m: t.update({n: x[:0] if "A" in n[-2:] else x[:, :0] for n, x in t.items()}),
            CheckpointError,
            "with r >= 1",
        ),
        (
            lambda t, m: t.update({"layers.0.q_proj.B0": t["layers.0.q_proj.B0"].int()}),
            CheckpointError,
            "has B0 of torch.int32, expected floating-point factors",
        ),
        (
            lambda t, m: m.update(scaling=m["scaling"].replace("2.0", '"x"')),
            CheckpointError,
            "has scaling 'x', expected .* finite numbers",
        ),
        (lambda t, m: m.update(scaling="3"), CheckpointError, "holds no JSON object 'scaling'"),
        (lambda t, m: m.update(scope="planet"), CheckpointError, "scope is 'planet', expected layer or model"),
    ],
    ids=[
        "version",
        "no-scaling",
        "bad-json",
        "scaling-of-nothing",
        "no-B0",
        "empty",
        "shape",
        "shapes-differ",
        "no-matrix",
        "rank-0",
        "integers",
        "scaling-of-text",
        "scaling-no-object",
        "scope",
    ],
)
def test_a_sidecar_that_is_wrong_is_refused(change, error, match, tmp_path):
    folder = rewritten(saved(tmp_path), change)
    with pytest.raises(error, match=match):
        pf.load_adapter(base(), folder)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'layers.0.q_proj' is not in the model; 3 more names differ"):
        pf.load_adapter(nn.Sequential(nn.Linear(2, 2)), saved(tmp_path))


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: x (os error 28)")], ids=repr
)
def test_a_save_that_fails_leaves_the_old_files_as_they_were(error, fails_at, tmp_path, monkeypatch):
    folder = saved(tmp_path)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    real, calls = safetensors.torch.save_file, []

    def filling_up(*arguments, **keywords):
        calls.append(arguments)
        real(*arguments, **keywords)
        if len(calls) == fails_at:
            raise error

    monkeypatch.setattr(safetensors.torch, "save_file", filling_up)
    with pytest.raises(ResourceError, match="No space left"):
        pf.save_adapter(stepped(linearized(), seed=4), folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
    ],
    ids=str,
)
def test_variants_in_a_config_are_refused_by_name(fields, match):
    config = peft.LoraConfig(target_modules=["q_proj"], **fields)
    with pytest.raises(CompatibilityError, match=f"expected plain LoRA, got {match}"):
        refuse_variants(config.to_dict())
    with pytest.raises(CompatibilityError, match=match):
        pf.register(config)


def test_other_kinds_of_adapters_are_refused_by_name():
    with pytest.raises(CompatibilityError, match="peft_type is 'IA3', expected 'LORA'"):
        refuse_variants(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).to_dict())
