"""Concrete masks as one operation: sampled, divided by their mean, merged under, and learned, without being stored."""

from peta_fast.ops.concrete_mask.op import concrete_merge, sample_mask
from peta_fast.ops.concrete_mask.pieces import Adam, Piece

__all__ = ["Adam", "Piece", "concrete_merge", "sample_mask"]
