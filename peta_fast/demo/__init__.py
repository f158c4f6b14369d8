"""The demonstration: real images, one base, four fine-tunes, five merges, one table and one picture. No network.

The flow reads off `run.run_demo`.
"""

from __future__ import annotations

from peta_fast.demo.run import DemoResult, Row, run_demo

__all__ = ["DemoResult", "Row", "run_demo"]
