"""Layers and models that are linear in their adapters: LinearizedLoRALinear, linearize, PEFT in and out."""

from __future__ import annotations

from peta_fast.nn.attention_only import attention_only, fused_qkv, separate_qkv
from peta_fast.nn.combine import add_adapters, task_vector
from peta_fast.nn.groups import group_projections
from peta_fast.nn.linear import LinearizedLoRALinear
from peta_fast.nn.model import delinearize, disable_adapter, linearize, set_adapter
from peta_fast.nn.saving import load_adapter, save_adapter
from peta_fast.nn.tangent import TangentModel
from peta_fast.nn.trained import extract_trained, load_trained, save_trained, trained_difference, trained_tensors
from peta_fast.nn.whole_model import LinearizedModel


def register(config):
    """Makes get_peft_model(model, config) build linearized layers; see peta_fast.nn.peft_layer.register."""
    from peta_fast.nn import peft_layer

    return peft_layer.register(config)


__all__ = [
    "LinearizedLoRALinear", "LinearizedModel", "TangentModel", "add_adapters", "attention_only", "delinearize",
    "disable_adapter", "extract_trained", "fused_qkv", "group_projections", "linearize", "load_adapter", "load_trained",
    "register", "save_adapter", "save_trained", "separate_qkv", "set_adapter", "task_vector", "trained_difference",
    "trained_tensors",
]  # fmt: skip
