"""Without the calls that only Linux has, a flow stops in one paragraph, and the steps' own helpers work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PRETEND = """
import os, signal, sys
{imports}
sys.platform = "darwin"
for module, names in ((os, ("sched_getaffinity", "pidfd_open")), (signal, ("sigtimedwait",))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
{code}
"""


def on_a_mac(root: Path, imports: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose platform is darwin, with the calls removed that macOS lacks."""
    script = PRETEND.format(imports=imports, code=code)
    return subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("flow", ["compare", "retrain", "serve", "promote"])
def test_a_flow_stops_in_one_paragraph_that_names_what_works(root: Path, flow: str) -> None:
    imports = "import flows.command"
    code = f"sys.exit(flows.command.main({flow!r}, '', lambda _: None, lambda parser: None, []))"
    done = on_a_mac(root, imports, code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: flows need Linux, and this system is darwin: ")
    assert "Type `dvc repro`" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_helpers_of_steps_work_without_the_calls_of_linux(root: Path) -> None:
    imports = "from pipelines.runtime import machine, process; from tasks import slots; from posttrain.models import allocator"
    code = (
        ""
        "assert machine.available_cores() == os.cpu_count(); assert slots._cpu_slots() >= 1;"
        "assert 0 < machine.peak_resident_mib() < 2**20"
    )
    done = on_a_mac(root, imports, code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts it apart from the parent's")
def test_the_peak_of_a_program_is_not_that_of_the_program_that_started_it(root: Path) -> None:
    child = "from pipelines.runtime.machine import peak_resident_mib; print(peak_resident_mib())"
    parent = (
        f"import subprocess, sys; held = b'x' * 2**29; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    assert 0 < float(done.stdout) < 256


def test_a_missing_file_of_an_example_is_named_with_what_to_do(tmp_path: Path) -> None:
    from pipelines.config.data_schema import TableSource
    from pipelines.data.sources import _records
    from posttrain.errors import DataError

    missing = str(tmp_path / "train.jsonl")
    with pytest.raises(
        DataError, match=r"train\.jsonl: no such file\..*docs/examples\.md lists where to download them"
    ):
        _records("sft", TableSource(source=missing))
