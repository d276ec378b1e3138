"""The script for a GPU also runs here at a tiny size, and its agreement checks hold on any device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)


def test_the_tiny_run_measures_everything_and_agrees(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    # -I: a bare box without the installed package, in another folder
    command = [sys.executable, "-I", str(root / "benchmarks" / "gpu.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", out.read_text(encoding="utf-8"), re.MULTILINE))
    exact = next(value for name, value in rows.items() if "float32: largest" in name)
    rounded = next(value for name, value in rows.items() if "bfloat16: largest" in name)
    assert float(exact) < 1e-4
    assert 0 < float(rounded) < 0.2
    for name, value in rows.items():
        if name.endswith(("tokens/s", "seconds", "tokens/s, end to end")):
            assert float(value.replace(",", "")) > 0, name
    assert sum("tokens/s" in name for name in rows) == 4
    assert "SFT, 8 rows of 8 to 64 tokens: tokens/s" in rows
