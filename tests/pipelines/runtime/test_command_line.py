"""Numbers on command lines: the parser refuses those outside of a range, and names the range."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import calibrate, chat, label, plan, serve
from pipelines.runtime.command_line import PORT, SEED, TEMPERATURE, command_parser, real, whole


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "words"),
    [
        (whole(1), ("1", "9007199254740992"), ("0", "-1", "1.5", "x", "", "9" * 30), "is no whole number from 1 on"),
        (PORT, ("0", "65535"), ("-1", "65536", "99999999"), "is no whole number from 0 to 65535"),
        (SEED, ("0", "4294967295"), ("-1", "4294967296"), "is no whole number from 0 to 4294967295"),
        (real(0.5, 2), ("0.5", "2"), ("0", "nan", "inf", "-inf", "2.1", "x"), "is not a number from 0.5 to 2"),
        (TEMPERATURE, ("0", "0.7", "1000"), ("1e-30", "-1", "nan"), "is not 0, or a number from 0.001 to 1000"),
    ],
)
def test_a_number_outside_of_its_range_is_refused_with_the_range(
    kind: Callable[[str], Any],
    right: tuple[str, ...],
    wrong: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = command_parser("posttrain test", "")
    parser.add_argument("--value", type=kind)
    assert [parser.parse_args([f"--value={text}"]).value for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--value={text}"])
        assert ended.value.code == 2
        assert f"argument --value: {text[:40]!r} {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (plan.main, ["--memory", "nan"]),
        (plan.main, ["--memory", "inf"]),
        (plan.main, ["--memory", "-1"]),
        (calibrate.main, ["--sides", "0"]),
        (chat.main, ["champion", "--temperature", "nan"]),
        (chat.main, ["champion", "--max-new-tokens", "0"]),
        (chat.main, ["champion", "--seed", "-1"]),
        (label.main, ["champion", "--count", "0"]),
        (label.main, ["champion", "--port", "99999999"]),
        (serve.main, ["champion", "--port", "-1"]),
        (serve.main, ["champion", "--max-tokens", "0"]),
        (serve.main, ["champion", "--shadow-share", "2"]),
    ],
)
def test_every_command_checks_its_numbers(
    command: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[-2]}: " in capsys.readouterr().err


def test_an_interpreter_without_docstrings_is_refused_in_words(root: Path) -> None:
    """pydantic would end in a traceback while it is imported."""
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "pipelines.ingest"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "PYTHONOPTIMIZE=2 (python -OO) removes docstrings" in done.stderr
