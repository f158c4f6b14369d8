"""Linearized LoRA as one operation: the first-order expansion of a LoRA layer around (A0, B0), at the cost of LoRA."""

from peta_fast.ops.linearized_lora.group import Projection, linearized_lora_group
from peta_fast.ops.linearized_lora.op import linearized_lora, linearized_lora_dual

__all__ = ["Projection", "linearized_lora", "linearized_lora_dual", "linearized_lora_group"]
