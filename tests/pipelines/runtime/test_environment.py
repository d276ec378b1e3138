"""Every command sets these variables before its tools are imported."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import build_opener

import pytest

from pipelines.runtime import environment
from pipelines.runtime.redaction import report_machine_fault
from posttrain.files import named_in_errors
from tests.webhook import listening


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        named_in_errors(tmp_path / "a.json"),
        open("/dev/full", "wb", 0) as full,
    ):
        full.write(b"x")
    assert environment.machine_fault(caught.value) == f"No space left on device: {tmp_path}/a.json"


def test_a_full_disk_without_a_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert environment.machine_fault(full) == f"No space left on device: {tmp_path}"
    monkeypatch.setenv("TMPDIR", "/proc")  # a file system without free space
    assert environment.machine_fault(full) == "No space left on device: /proc"
    assert environment.machine_fault(OSError(errno.EPIPE, "Broken pipe")) is None


def test_a_bug_is_no_fault_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_machine_fault(PermissionError(errno.EACCES, "Permission denied", "/x/y")) == 2
    assert capsys.readouterr().err.startswith("error: Permission denied: /x/y. Free space, or give this user the right")
    with pytest.raises(BrokenPipeError):
        report_machine_fault(BrokenPipeError(errno.EPIPE, "Broken pipe"))


@pytest.mark.parametrize("mine", [None, "intranet,.example.com"])
def test_servers_of_our_own_are_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch, mine: str | None) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, mine or "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with listening() as (url, told):
        with pytest.raises(URLError):
            build_opener().open(url, b"{}", timeout=10)
        environment.quiet()
        environment.quiet()
        build_opener().open(url, b"{}", timeout=10).close()
    assert told == [{}]
    expected = ["127.0.0.1", "localhost"]
    assert os.environ["no_proxy"].split(",") == [*(mine.split(",") if mine else ()), *expected]


def test_without_a_proxy_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    environment.quiet()
    assert "no_proxy" not in os.environ
