"""Merge, apply, extract and export LoRA adapters."""
