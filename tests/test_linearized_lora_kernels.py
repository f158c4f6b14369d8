"""The Triton kernels of linearized LoRA: in the interpreter against the plain formulas, and built for three GPUs."""

from __future__ import annotations

import json

import pytest
from interpreter import run_python
from linearized_lora_interpreted import CHECKS

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Name of a check -> what went wrong in it."""
    ran = run_python("linearized_lora_interpreted.py")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert not interpreted[check], interpreted[check]
