"""The comparison of sampling engines: every side samples the tokens that it is asked for, and the script runs in miniature."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.rollouts import Case, continuous, generate, native
from benchmarks.rollouts import EOS, MEAN_LENGTH, SMALL, TINY, Row, built_in, ending, main, shares, table

PROMPTS = [[7, 8, 9], [10, 11, 12]]


@pytest.mark.parametrize("side", [native, generate, continuous])
def test_every_side_samples_all_that_it_is_asked_for(side: Any) -> None:
    model = built_in(TINY.models[0])
    assert side(model, Case(PROMPTS, 3, 5))() == 2 * 3 * 5


@pytest.mark.parametrize("side", [native, generate])
def test_uneven_answers_are_as_long_on_every_side(side: Any) -> None:
    # geometric: mean 64, cut at 128 to 64 x (1 - (63/64)^128) = 55; the mean of 240 answers varies by 2.8
    tokens = side(ending(built_in(SMALL)), Case(PROMPTS, 120, 128, eos=EOS))()
    assert MEAN_LENGTH == 64
    assert 55 - 5 * 2.8 < tokens / 240 < 55 + 5 * 2.8


def test_ratios_are_of_medians() -> None:
    row = Row("a case", None, Case(PROMPTS, 3, 5), bar=1.6)
    line = table({row.name: (row, {"native": [30.0, 10.0, 20.0], "generate": [8.0, 4.0, 5.0]})}).splitlines()[-1]
    assert line == "| a case | 6 x 5 | 20 (10 to 30) | 5 (4 to 8) | 4.00 | 1.6 |  |  |  |  |"


def test_shares_of_time_are_of_one_whole() -> None:
    found = shares(built_in(TINY.models[0]), Case(PROMPTS, 3, 5))
    assert set(found) == {"prompts", "layers without attention", "attention", "head", "drawing", "batching"}
    assert all(share > 0 for share in found.values())
    assert sum(found.values()) == pytest.approx(1)


def test_the_script_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollouts.md"
    main(["--tiny", "--write", "--out", str(out)])
    written = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in written
    cases = re.findall(r"^\| (0\.3 M|30 M).*? \| (\d+) x (\d+) \| ([\d,]+) \(", written, re.MULTILINE)
    assert [case[1:3] for case in cases] == [("16", "4"), ("16", "32"), ("8", "2"), ("8", "2")]
    assert (tmp_path / "rollouts.png").stat().st_size > 1000
