"""The full demonstration: digits and text, five ways to fine-tune, nine to merge, three seeds. No network.

The flow reads off `run.run_full`; what one seed, track and kind do, off `chain.Chain`.
"""

from __future__ import annotations

from peta_fast.demo.full.run import run_full

__all__ = ["run_full"]
