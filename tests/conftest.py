"""Property tests draw the same examples in every run; with --hypothesis-profile=fuzz, fresh ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fuzz", derandomize=False)
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


@pytest.fixture
def mount_disk(tmp_path):
    """mount(options) gives `tmp_path / "disk"` as a disk of its own, in memory: "size=4m,ro"."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a small disk here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)
